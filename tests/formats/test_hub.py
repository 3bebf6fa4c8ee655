"""A Hub id: what is asked for, what the cache gives without a connection, and what is said when neither helps.

No test leaves this machine: functions stand in the place of the Hub's client.
"""

from types import SimpleNamespace

import huggingface_hub as hub
import huggingface_hub.errors  # noqa: F401 (as hub.denoising_loss)
import pytest
import torch
from helpers.checkpoints import (
    FILE,
    NETWORKS,
    vocabulary_read_once,
    weights,
    write_folder,
    write_single,
)  # noqa: F401

import alchemy
from alchemy.formats.hub import find
from alchemy.formats.saving import save_checkpoint

ID, COMMIT = "org/tiny-xl", "0123456789abcdef0123456789abcdef01234567"
TOKENIZERS = [
    f"{t}/{f}"
    for t in ("tokenizer", "tokenizer_2")
    for f in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
]
SETTINGS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{n}/config.json" for n in NETWORKS),
    *TOKENIZERS,
]
OTHERS = [
    ".gitattributes",
    "LICENSE.md",
    "README.md",
    "01.png",
    "pipeline.png",
    "sd_xl_base_1.0.safetensors",
    "sd_xl_base_1.0_0.9vae.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "unet/openvino_model.bin",
    "unet/openvino_model.xml",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.onnx",
    "text_encoder/openvino_model.bin",
    "text_encoder_2/model.onnx_data",
    "text_encoder_2/openvino_model.xml",
    "vae/diffusion_flax_model.msgpack",
    "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/config.json",
    "vae_decoder/model.onnx",
    "vae_encoder/config.json",
    "vae_encoder/openvino_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
]  # what stabilityai/stable-diffusion-xl-base-1.0 also holds, or its relatives do


def weight_names(variant="", networks=NETWORKS):
    return [f"{name}/{FILE[name]}{variant}.safetensors" for name in networks]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """asked(names): the Hub has these files; snapshot_download writes into the returned dict what it is asked for."""

    def play(names, error=None):
        seen = {}

        def model_info(source, revision=None):
            seen.update(listed=(source, revision))
            if error:
                raise error
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

        def snapshot_download(source, revision=None, allow_patterns=None, local_files_only=False):
            seen.update(
                source=source,
                revision=revision,
                wanted=sorted(allow_patterns),
                offline=local_files_only,
            )
            if error:
                raise hub.errors.LocalEntryNotFoundError(
                    "Cannot find an appropriate cached snapshot folder\nand more"
                )
            return str(tmp_path)

        monkeypatch.setattr(hub, "model_info", model_info)
        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        return seen

    return play


def failure(name, message="401 Client Error. (Request ID: 1)\n\nRepository Not Found\nfor url"):
    """An error of the Hub's client, of whatever arguments its version takes."""
    kind = getattr(hub.errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


# What is asked for


@pytest.mark.parametrize("half, variant", [(True, ".fp16"), (False, "")])
def test_only_the_needed_files_of_one_precision_are_asked_for(asked, half, variant):
    seen = asked(SETTINGS + OTHERS + weight_names() + weight_names(".fp16"))
    find(ID, NETWORKS, half)
    assert seen["wanted"] == sorted(SETTINGS + weight_names(variant)) and (
        seen["source"],
        seen["offline"],
    ) == (ID, False)


@pytest.mark.parametrize("half", [True, False])
def test_where_only_one_precision_is_there_it_is_asked_for(asked, half):
    for variant in ("", ".fp16"):
        seen = asked(SETTINGS + OTHERS + weight_names(variant))
        find(ID, NETWORKS, half)
        assert seen["wanted"] == sorted(SETTINGS + weight_names(variant))


def test_all_shards_are_asked_for(asked):
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    seen = asked(SETTINGS + shards + weight_names("", NETWORKS[1:]))
    find(ID, NETWORKS)
    assert seen["wanted"] == sorted(SETTINGS + shards + weight_names("", NETWORKS[1:]))


def test_of_a_hub_id_given_as_vae_only_the_vae_is_asked_for_and_of_one_given_as_config_no_weights(
    asked, tmp_path
):
    write_folder(tmp_path)
    seen = asked(SETTINGS + OTHERS + weight_names())
    alchemy.load(tmp_path, "cpu", vae=ID)
    assert seen["wanted"] == sorted(SETTINGS + weight_names("", ["vae"]))
    alchemy.load(write_single(tmp_path / "model.safetensors"), "cpu", config=ID)
    assert seen["wanted"] == sorted(SETTINGS)
    alchemy.load(ID, "cpu", vae=tmp_path / "vae")
    assert seen["wanted"] == sorted(
        SETTINGS + weight_names("", [n for n in NETWORKS if n != "vae"])
    )


def test_a_repository_that_is_only_a_vae_serves_as_vae(asked):
    seen = asked(
        [
            "README.md",
            "config.json",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.bin",
            "sdxl_vae.safetensors",
            "sdxl.vae.safetensors",
        ]
    )
    find(ID, ["vae", ""])
    assert seen["wanted"] == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("revision", [None, "v1.0", COMMIT])
def test_the_revision_is_passed_on(asked, tmp_path, revision):
    write_folder(tmp_path)
    seen = asked(SETTINGS + weight_names())
    alchemy.load(ID, "cpu", revision=revision)
    assert seen["listed"] == (ID, revision) and seen["revision"] == revision


def test_a_folder_written_from_the_hub_is_of_the_revision_that_was_loaded_and_asks_for_nothing_more(
    asked, tmp_path
):
    write_folder(tmp_path)
    seen = asked(SETTINGS + weight_names())
    sdxl = alchemy.load(ID, "cpu", revision="v1.0")
    seen.clear()
    save_checkpoint(sdxl, tmp_path / "written")
    there = {
        file.relative_to(tmp_path / "written").as_posix()
        for file in (tmp_path / "written").rglob("*.*")
    }
    assert seen == {} and there == {*SETTINGS, *weight_names()}


def test_what_exists_here_is_never_looked_up_on_the_hub(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "org" / "tiny-xl")
    seen = asked([])
    assert alchemy.load(ID, "cpu").source == ID and seen == {}


# What is said


@pytest.mark.parametrize(
    "error, words",
    [
        ("RepositoryNotFoundError", "not on the Hub, or private"),
        ("GatedRepoError", "gated: accept its terms"),
        ("RevisionNotFoundError", "no such revision"),
        ("OfflineModeIsEnabled", "cache does not hold it"),
        ("HfHubHTTPError", "cache does not hold it"),
        ("HTTPError", "cache does not hold it"),
    ],
)
def test_what_cannot_be_had_is_one_line(asked, error, words):
    seen = asked([], failure(error))
    with pytest.raises(ValueError, match=words) as caught:
        alchemy.load(ID, "cpu")
    assert (
        str(caught.value).startswith(ID + ":")
        and "\n" not in str(caught.value)
        and error in str(caught.value)
    )
    assert seen["offline"]  # the cache was asked before giving up


@pytest.mark.parametrize(
    "error",
    [
        failure("GatedRepoError"),
        OSError(28, "No space left on device"),
        failure("HTTPError", "timed out"),
    ],
)
def test_a_download_that_fails_is_one_line(asked, monkeypatch, error):
    asked(SETTINGS + weight_names())

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="gated|No space left|timed out") as caught:
        alchemy.load(ID, "cpu")
    assert str(caught.value).startswith(ID + ":") and "\n" not in str(caught.value)


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as the Hub's client lays it out, made by hand."""
    root = tmp_path / "models--org--tiny-xl"
    write_folder(root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "error",
    ["OfflineModeIsEnabled", "HTTPError", "HfHubHTTPError", "RepositoryNotFoundError", None],
)
def test_what_is_in_the_cache_works_without_a_connection(cache, monkeypatch, error):
    def fail(*args, **options):
        raise failure(error)

    if error:  # else: the client itself is offline
        monkeypatch.setattr(hub, "model_info", fail)
    sdxl = alchemy.load(ID, "cpu")
    assert all(torch.equal(t, weights()["unet"][key]) for key, t in sdxl.unet.state_dict().items())
    assert len(alchemy.load(ID, "cpu", revision=COMMIT).text_encoders) == 2


def test_a_revision_or_a_repository_that_is_not_in_the_cache_is_named(cache):
    for source, revision in ((ID, "v2"), ("org/other", None)):
        with pytest.raises(ValueError, match="cache does not hold it") as caught:
            alchemy.load(source, "cpu", revision=revision)
        assert source in str(caught.value) and "\n" not in str(caught.value)


def test_a_cache_without_the_weights_is_told_before_anything_is_read(cache, tmp_path):
    for file in tmp_path.rglob("unet/*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="no safetensors weights"):
        alchemy.load(ID, "cpu")
