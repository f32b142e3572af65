"""From loader to device: order, one batch ahead, the state of what was handed out, the window."""

import jax
import numpy as np
import pytest

from mambamim_jax.data.volume import window_intensity
from mambamim_jax.train.feed import Feed, window


class Numbers:
    """A stream that counts."""

    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        return {"image": np.full((2, 3), self.number, np.int16), "index": np.array([self.number])}

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        if state["number"] < 0:
            raise ValueError("other data")
        self.number = state["number"]


def test_the_state_is_that_of_what_was_handed_out():
    stream = Numbers()
    feed = Feed(stream, ("image",))
    assert feed.get_state() == {"number": 0}
    seen = []
    for _ in range(3):
        batch = next(feed)
        feed.advance()
        feed.advance()  # no further ahead than one
        assert stream.number == int(batch["image"][0, 0]) + 1
        assert feed.get_state() == {"number": int(batch["image"][0, 0])}
        assert set(batch) == {"image"}
        assert isinstance(batch["image"], jax.Array)
        seen.append(int(batch["image"][0, 0]))
    assert seen == [1, 2, 3]
    feed.set_state({"number": 1})
    assert int(next(feed)["image"][0, 0]) == 2
    with pytest.raises(ValueError, match="other data"):
        feed.set_state({"number": -1})


def test_batches_are_placed_as_asked():
    placed = []
    feed = Feed(Numbers(), ("index",), lambda batch: placed.append(batch) or batch)
    next(feed)
    feed.advance()
    assert [int(batch["index"][0]) for batch in placed] == [1, 2]


@pytest.mark.parametrize("limits", [(-175.0, 250.0), (-1000.5, 1000.0), (-160.0, 240.0)])
def test_the_window_is_the_hosts_bit_for_bit(limits):
    hu = np.arange(-32768, 32768, dtype=np.int16)
    on_device = np.asarray(jax.jit(window, static_argnums=1)(hu, limits))
    assert on_device.dtype == np.float32
    assert np.array_equal(on_device, window_intensity(hu, limits))
    done = np.linspace(0, 1, 5, dtype=np.float32)
    assert window(done, limits) is done
