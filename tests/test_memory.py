"""How many pages fit."""

from dataclasses import dataclass, field

import pytest

from jaxengine.memory import GIB, Demand, bytes_in_use, device_bytes, num_pages_that_fit

PAGE = 1 << 20


@dataclass
class Device:
    """A GPU of 100 GiB."""

    stats: dict | None = field(default_factory=lambda: {"bytes_limit": 100 * GIB})

    def memory_stats(self) -> dict | None:
        return self.stats


def fit(fraction: float | None, **demand: float) -> int:
    amounts = {"others": 0.0, "weights": 0.0, "state": 0.0, "steps": 0.0} | demand
    wanted = Demand(**{name: int(amount * GIB) for name, amount in amounts.items()})
    return num_pages_that_fit(Device(), wanted, PAGE, mem_fraction_static=fraction)


def test_the_pool_takes_what_weights_and_steps_leave() -> None:
    rest = fit(None, weights=16, state=1, steps=4) * PAGE / GIB
    assert 76 < rest < 100 - 16 - 1 - 4


def test_a_fraction_limits_weights_and_pool_together() -> None:
    assert fit(0.5, weights=16) * PAGE == 34 * GIB
    assert fit(0.99, weights=16, steps=40) < fit(0.99, weights=16)


def test_what_else_lives_in_the_process_is_left_alone() -> None:
    assert bytes_in_use(Device({"bytes_limit": 100 * GIB, "bytes_in_use": 60 * GIB})) == 60 * GIB
    assert bytes_in_use(Device(stats=None)) == 0
    assert 20 * GIB < fit(None, others=60, weights=10) * PAGE < 30 * GIB


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ValueError, match="100.00 GiB, of which 1.00 are in use for other things, weights take 99"
    ) as error:
        fit(None, others=1, weights=99)
    assert "lower chunked_prefill_size" in str(error.value)
    with pytest.raises(ValueError, match=r"raise mem_fraction_static \(0.1\)"):
        fit(0.1, weights=16)


def test_a_device_without_statistics_counts_as_a_part_of_the_host() -> None:
    assert GIB // 4 < device_bytes(Device(stats=None)) < 1 << 50
