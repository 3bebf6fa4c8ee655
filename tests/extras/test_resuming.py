"""An interrupted run of every method ends with the same files to the bit."""

import pytest
from helpers.forking import WAYS, flags
from helpers.running import call, contents, good, refused


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_of_any_method_resumes_to_the_same_bits(tiny, way, stopped):
    command = flags(tiny, way, "--batch", 1, "--steps", 3, "--save-every", 100)
    good(call(*command, "--out", "whole/run"))
    assert stopped((*command, "--out", "half/run"), step=1).status == 143
    good(call("train.py", "--out", "half/run", "--resume"))
    whole, half = contents("whole/run"), contents("half/run")
    results = [name for name in whole if name.endswith(".safetensors") and "state" not in name]
    assert results and whole.keys() == half.keys()
    assert all(half[name] == whole[name] for name in results)
    refused(call("train.py", "--out", "half/run", "--resume"), "half/run: this run is finished")
