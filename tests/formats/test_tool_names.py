"""Complete lists: every layer of SDXL base under the names of other tools' LoRA files."""

from collections import Counter

import pytest
from helpers.tool_names import TOOLS, manifest
from helpers.tool_names import rows as all_rows

from alchemy import lora
from alchemy.formats.checkpoint import BASE, CONFIGS, build_on_meta
from alchemy.formats.lora import KOHYA, known_key_names, kohya_name, networks_in


@pytest.fixture(scope="module")
def rows():
    return all_rows()


@pytest.fixture(scope="module")
def networks():
    return {name: build_on_meta(name, CONFIGS[name].from_config(BASE[name])) for name in KOHYA}


def test_the_lists_are_complete(rows, networks):
    layers = {row["layer"] for row in rows}
    for name, network in networks.items():
        ours = {f"{name}.{layer}" for layer in lora.layers(network)}
        assert ours == {layer for layer in layers if layer.startswith(name + ".")}
    # What the tools themselves report for SDXL: sd-scripts "enable LoRA for text encoder: 264
    # modules", "create LoRA for U-Net: 722 modules" (its transformers); LyCORIS, preset full,
    # "create LyCORIS for U-Net: 788 modules" (also resnets, down- and upsamplers).
    counts = Counter()
    for layer in layers:
        counts["text"] += ".encoder.layers." in layer
        counts["transformers"] += ".attentions." in layer
        counts["blocks"] += layer.startswith("unet.") and "block" in layer
    assert counts == {"text": 264, "transformers": 722, "blocks": 788}


def test_comfyuis_names_are_those_of_the_single_file(rows):
    weights = manifest()["single_file_layout"]
    for row in rows:
        if row["layer"].startswith("unet."):
            assert f"model.{row['comfyui']}.weight" in weights


@pytest.mark.parametrize("tool", TOOLS)
def test_every_name_of_a_tool_is_read_as_its_layer(rows, networks, tool):
    table = known_key_names(networks)
    named = [row for row in rows if tool in row]
    assert len({row[tool] for row in named}) == len(named) >= 794
    assert [row[tool] for row in named if table.get(row[tool]) != row["layer"]] == []
    for network in KOHYA:
        keys = [row[tool] + ".alpha" for row in named if row["layer"].startswith(network + ".")]
        assert networks_in(keys) == ([network] if keys else ["unet"])


def test_files_are_written_in_kohyas_names(rows, networks):
    for row in rows:
        network, _, name = row["layer"].partition(".")
        assert kohya_name(network, name, networks[network].config) == row["kohya"]
