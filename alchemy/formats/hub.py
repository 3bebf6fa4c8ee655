"""Where a checkpoint's files are: the folder or file itself, or what is fetched from the Hub; and which of them are read."""

import json
import re
from pathlib import Path

HUB = {
    "GatedRepoError": "gated: accept its terms on huggingface.co and log in with hf auth login",
    "RepositoryNotFoundError": "not on the Hub, or private",
    "RevisionNotFoundError": "no such revision on the Hub",
}


def find(source, networks=(), half=False, revision=None):
    """The path of a folder or file; a Hub id is fetched (configurations and those networks' weights) or taken from the Hub's cache."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.parent.exists():
        raise ValueError(
            f"{source}: no such folder or file, nor is it a Hub id like stabilityai/stable-diffusion-xl-base-1.0"
        )
    import huggingface_hub as hub
    from huggingface_hub.errors import HTTPError

    failures = (
        OSError,
        HTTPError,
    )  # the second is the HTTP library's, whose connection errors need not be OSErrors
    try:
        names, offline = (
            [file.rfilename for file in hub.model_info(str(source), revision=revision).siblings],
            None,
        )
        wanted = [
            n
            for n in names
            if re.fullmatch(
                r"((unet|vae|scheduler|text_encoder(_2)?|tokenizer(_2)?)/)?(\w+\.json|merges\.txt)",
                n,
            )
        ]
        for part in (f"{network}/".lstrip("/") for network in networks):
            wanted += [
                part + name
                for name in choose_weights(
                    [n[len(part) :] for n in names if n.startswith(part)], half
                )
            ]
    except failures as error:  # what is in the cache has to do; without these two names it would have to be the whole repository
        wanted, offline = ["config.json", "unet/config.json"], error
    try:
        return Path(
            hub.snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=wanted,
                local_files_only=offline is not None,
            )
        )
    except failures as error:
        error = offline or error
        words = HUB.get(
            type(error).__name__,
            "cannot be fetched, and the Hub's cache does not hold it; a folder or file works offline",
        )
        raise ValueError(
            f"{source}: {words} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from None


def choose_weights(names, half):
    """Of the file names in a network's folder, those to read: one file or its shards, the .fp16. ones first where half is wanted."""
    for variant in (r"\.fp16", "") if half else ("", r"\.fp16"):
        for ending in (
            variant,
            rf"{variant}-\d{{5}}-of-\d{{5}}",
            rf"-\d{{5}}-of-\d{{5}}{variant}",
        ):  # libraries differ
            chosen = sorted(
                n
                for n in names
                if re.fullmatch(rf"(diffusion_pytorch_)?model{ending}\.safetensors", n)
            )
            if chosen:
                return chosen
    return []


def weight_files(root, name, half):
    """The weight files of one network. Raises ValueError where there are none, or where a shard is missing."""
    folder = root / name if (root / name).is_dir() else root
    if not (chosen := choose_weights([p.name for p in folder.iterdir()], half)):
        raise ValueError(
            f"{folder}: no safetensors weights here (.bin and .ckpt files are pickles, which are never read)"
        )
    shards = re.search(r"-of-(\d+)", chosen[0])
    whole = (
        [re.sub(r"\d{5}-of", f"{i + 1:05d}-of", chosen[0]) for i in range(int(shards[1]))]
        if shards
        else chosen
    )
    if lost := [n for n in whole if n not in chosen]:
        raise ValueError(
            f"{folder}: {len(lost)} of {len(whole)} shards are missing: {', '.join(lost[:3])}"
        )
    return [folder / n for n in chosen]


def config_of(folder, *names):
    """The first of the named files that is there, a JSON object, as a dict; {} where there is none, or no folder."""
    for path in (folder / name for name in names if folder):
        if path.is_file():
            try:
                return {**json.loads(path.read_text(encoding="utf-8"))}
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"{path}: not a valid JSON object ({error})") from None
    return {}
