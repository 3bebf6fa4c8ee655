"""Find a checkpoint's files: a folder, a file, or a repository on the Hugging Face Hub."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from .text import shorten

EXPLANATIONS = {  # of the client's errors, by the name of their class
    "GatedRepoError": "gated: accept its terms on huggingface.co and log in with hf auth login",
    "RepositoryNotFoundError": "not on the Hub, or private",
    "RevisionNotFoundError": "no such revision on the Hub",
}
UNREACHABLE = "cannot be fetched, and the Hub's cache does not hold it; a folder or file is offline"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SETTINGS = re.compile(
    r"((unet|vae|scheduler|text_encoder(_2)?|tokenizer(_2)?)/)?(\w+\.json|merges\.txt)"
)


def find(
    source: str | Path,
    networks: Iterable[str] = (),
    half: bool = False,
    revision: str | None = None,
) -> Path:
    """The path of a local folder or file, or of a Hub repository in the Hub's cache.

    From the Hub, the configurations and the weights of `networks` are downloaded; without a
    connection, the cache alone is used. half: prefer .fp16. weights.
    Raises ValueError if there is neither.
    """
    path = Path(os.path.expanduser(source))  # which leaves ~nobody as it is
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(source)) or path.parent.exists():
        raise ValueError(
            f"{source}: no such folder or file, nor is it a Hub id like "
            "stabilityai/stable-diffusion-xl-base-1.0"
        )
    import huggingface_hub as hub
    from huggingface_hub.errors import HTTPError

    # HTTPError is the HTTP library's, whose connection errors need not be OSErrors.
    failures, offline = (OSError, HTTPError), None
    try:
        names = [file.rfilename for file in hub.model_info(str(source), revision=revision).siblings]
        patterns = wanted_files(names, networks, half)
    except failures as error:
        # Without these two names, an empty cache would be taken for a complete one.
        patterns, offline = ["config.json", "unet/config.json"], error
    options = {"revision": revision, "allow_patterns": patterns}
    try:
        folder = hub.snapshot_download(str(source), local_files_only=bool(offline), **options)
    except failures as error:
        error = offline or error
        explanation = EXPLANATIONS.get(type(error).__name__, UNREACHABLE)
        reason = f"{type(error).__name__}: {shorten(str(error).strip().partition(chr(10))[0])}"
        raise ValueError(f"{source}: {explanation} ({reason})") from None
    return Path(folder)


def wanted_files(names: list[str], networks: Iterable[str], half: bool) -> list[str]:
    """Of a repository's files, the configurations and the weights of these networks."""
    wanted = [name for name in names if SETTINGS.fullmatch(name)]
    for network in networks:
        folder = f"{network}/" if network else ""
        inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        wanted += [folder + name for name in choose_weights(inside, half)]
    return wanted


def choose_weights(names: list[str], half: bool) -> list[str]:
    """The weight files to read in a network's folder: one file, or its shards.

    half: prefer those named .fp16. to the others, else the reverse.
    """
    for variant in (r"\.fp16", "") if half else ("", r"\.fp16"):
        shard = r"-\d{5}-of-\d{5}"
        # The variant is before or after the shard's number, depending on the library's version.
        for ending in (variant, variant + shard, shard + variant):
            pattern = re.compile(rf"(diffusion_pytorch_)?model{ending}\.safetensors")
            chosen = sorted(name for name in names if pattern.fullmatch(name))
            if chosen:
                return chosen
    return []


def weight_files(root: Path, name: str, half: bool) -> list[Path]:
    """The weight files of one network: root itself if it is a file, else those in root/name.

    Raises ValueError if none is there or a shard is missing.
    """
    if root.is_file():
        return [root]
    folder = root / name if (root / name).is_dir() else root
    chosen = choose_weights([path.name for path in folder.iterdir()], half)
    if not chosen:
        raise ValueError(
            f"{folder}: no safetensors weights here "
            "(.bin and .ckpt files are pickles, which are never read)"
        )
    shards = re.search(r"-of-(\d+)", chosen[0])
    if shards:
        count = int(shards[1])
        every = [re.sub(r"\d{5}-of", f"{i + 1:05d}-of", chosen[0]) for i in range(count)]
        missing = sorted({*every} - {*chosen})
        if missing:
            first = ", ".join(missing[:3])
            raise ValueError(f"{folder}: {len(missing)} of {count} shards are missing: {first}")
    return [folder / file for file in chosen]
