"""Kernels of the UNet at full size, counted on the meta device (tests/bench/kernel_counts.py)."""

import kernel_counts


def test_a_sampling_forward_takes_at_most_1560_kernels():
    assert 1400 < kernel_counts.sampling_forward().total() <= 1560


def test_a_lora_beside_the_weights_adds_at_most_two_kernels_per_layer():
    plain, with_lora = (kernel_counts.sampling_forward(rank) for rank in (0, 16))
    assert with_lora.total() - plain.total() <= 2 * 560 and "_to_copy" in plain
    assert with_lora["_to_copy"] == plain["_to_copy"]  # nothing is cast at each step


def test_a_lora_step_takes_at_most_7500_kernels():
    kernels = kernel_counts.lora_step()
    assert 6000 < kernels.total() <= 7500
    assert kernels["_foreach_copy_"] == 2 * 18  # down and up cast once, and their gradients once
