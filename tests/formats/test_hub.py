"""A Hub id: what is downloaded, what the cache gives without a connection, and the messages.

No test leaves this machine: functions take the place of the Hub's client.
"""

from types import SimpleNamespace

import huggingface_hub as hub
import huggingface_hub.errors  # noqa: F401  as hub.errors
import pytest
from helpers.checkpoints import (
    FILE,
    NETWORKS,
    refused,
    same,
    weights,
    write_folder,
    write_single,
)
from helpers.running import contents

import alchemy
from alchemy.formats.hub import find
from alchemy.formats.saving import save_checkpoint

ID, COMMIT = "org/tiny-xl", "0123456789abcdef0123456789abcdef01234567"
SETTINGS = ["model_index.json", "scheduler/scheduler_config.json"]
SETTINGS += [f"{name}/config.json" for name in NETWORKS]
for tokenizer in ("tokenizer", "tokenizer_2"):
    files = "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"
    SETTINGS += [f"{tokenizer}/{file}" for file in files]
# What stabilityai/stable-diffusion-xl-base-1.0 also holds, or its relatives do.
OTHERS = """
    .gitattributes LICENSE.md README.md 01.png pipeline.png sd_xl_base_1.0.safetensors
    sd_xl_base_1.0_0.9vae.safetensors sd_xl_offset_example-lora_1.0.safetensors
    unet/diffusion_flax_model.msgpack unet/model.onnx unet/model.onnx_data
    unet/openvino_model.bin unet/openvino_model.xml text_encoder/flax_model.msgpack
    text_encoder/model.onnx text_encoder/openvino_model.bin text_encoder_2/model.onnx_data
    text_encoder_2/openvino_model.xml vae/diffusion_flax_model.msgpack vae_1_0/config.json
    vae_1_0/diffusion_pytorch_model.safetensors vae_decoder/config.json vae_decoder/model.onnx
    vae_encoder/config.json vae_encoder/openvino_model.bin unet/diffusion_pytorch_model.bin
    text_encoder/pytorch_model.bin safety_checker/model.safetensors
    unet/diffusion_pytorch_model.non_ema.safetensors
    unet/diffusion_pytorch_model.safetensors.index.json
""".split()


def weight_names(variant="", networks=NETWORKS):
    return [f"{name}/{FILE[name]}{variant}.safetensors" for name in networks]


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """fake_hub(names): the Hub has these files; the returned dict records the requests."""

    def install(names, error=None):
        requests = {}

        def model_info(source, revision=None):
            requests.update(listed=(source, revision))
            if error:
                raise error
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

        def snapshot_download(source, revision=None, allow_patterns=None, local_files_only=False):
            requests.update(source=source, revision=revision, offline=local_files_only)
            requests["files"] = sorted(allow_patterns)
            if error:
                raise hub.errors.LocalEntryNotFoundError("Cannot find a cached snapshot\nand more")
            return str(tmp_path)

        monkeypatch.setattr(hub, "model_info", model_info)
        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        return requests

    return install


def failure(name, message="401 Client Error. (Request ID: 1)\n\nRepository Not Found\nfor url"):
    """An error of the Hub's client, whatever arguments its version takes."""
    kind = getattr(hub.errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


# What is downloaded

SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SHARDED = SHARDS + weight_names("", NETWORKS[1:])
BOTH = weight_names() + weight_names(".fp16")


@pytest.mark.parametrize(
    "half, available, expected",
    [
        (True, BOTH, weight_names(".fp16")),
        (False, BOTH, weight_names()),
        (True, weight_names(), weight_names()),
        (False, weight_names(".fp16"), weight_names(".fp16")),
        (False, SHARDED, SHARDED),
    ],
)
def test_only_the_needed_files_of_one_precision_are_downloaded(fake_hub, half, available, expected):
    requests = fake_hub(SETTINGS + OTHERS + available)
    find(ID, NETWORKS, half)
    assert requests["files"] == sorted(SETTINGS + expected)
    assert (requests["source"], requests["offline"]) == (ID, False)


def test_of_a_vae_only_the_vae_is_downloaded_and_of_a_config_no_weights(fake_hub, tmp_path):
    write_folder(tmp_path)
    requests = fake_hub(SETTINGS + OTHERS + weight_names())
    alchemy.load(tmp_path, "cpu", vae=ID)
    assert requests["files"] == sorted(SETTINGS + weight_names("", ["vae"]))
    alchemy.load(write_single(tmp_path / "model.safetensors"), "cpu", config=ID)
    assert requests["files"] == sorted(SETTINGS)
    alchemy.load(ID, "cpu", vae=tmp_path / "vae")
    others = [name for name in NETWORKS if name != "vae"]
    assert requests["files"] == sorted(SETTINGS + weight_names("", others))


def test_a_repository_that_is_only_a_vae_serves_as_vae(fake_hub):
    needed = ["config.json", "diffusion_pytorch_model.safetensors"]
    others = ["README.md", "diffusion_pytorch_model.bin", "sdxl_vae.safetensors"]
    requests = fake_hub(needed + others + ["sdxl.vae.safetensors"])
    find(ID, ["vae", ""])
    assert requests["files"] == needed


@pytest.mark.parametrize("revision", [None, "v1.0", COMMIT])
def test_the_revision_is_passed_on(fake_hub, tmp_path, revision):
    write_folder(tmp_path)
    requests = fake_hub(SETTINGS + weight_names())
    sdxl = alchemy.load(ID, "cpu", revision=revision)
    assert requests["listed"] == (ID, revision) and requests["revision"] == revision
    # Saving it asks for nothing more.
    requests.clear()
    save_checkpoint(sdxl, tmp_path / "written")
    assert requests == {}
    assert contents(tmp_path / "written").keys() == {*SETTINGS, *weight_names()}


def test_what_exists_here_is_never_looked_up_on_the_hub(fake_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "org" / "tiny-xl")
    requests = fake_hub([])
    assert alchemy.load(ID, "cpu").source == ID and requests == {}


# Messages


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
def test_what_cannot_be_fetched_is_one_line(fake_hub, error, words):
    requests = fake_hub([], failure(error))
    line = refused(lambda: alchemy.load(ID, "cpu"), words, error)
    assert line.startswith(ID + ":")
    assert requests["offline"]  # the cache was tried before giving up


@pytest.mark.parametrize(
    "error, words",
    [
        (failure("GatedRepoError"), "gated"),
        (OSError(28, "No space left on device"), "No space left"),
        (failure("HTTPError", "timed out"), "timed out"),
    ],
)
def test_a_download_that_fails_is_one_line(fake_hub, monkeypatch, error, words):
    fake_hub(SETTINGS + weight_names())

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    assert refused(lambda: alchemy.load(ID, "cpu"), words).startswith(ID + ":")


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
    same(alchemy.load(ID, "cpu").unet, weights()["unet"])
    assert len(alchemy.load(ID, "cpu", revision=COMMIT).text_encoders) == 2


@pytest.mark.parametrize("source, revision", [(ID, "v2"), ("org/other", None)])
def test_what_is_not_in_the_cache_is_named(cache, source, revision):
    load = lambda: alchemy.load(source, "cpu", revision=revision)  # noqa: E731
    refused(load, source, "cache does not hold it")


def test_a_cache_without_the_weights_is_refused_before_anything_is_read(cache, tmp_path):
    for file in tmp_path.rglob("unet/*.safetensors"):
        file.unlink()
    refused(lambda: alchemy.load(ID, "cpu"), "no safetensors weights")
