"""Named places of a forward pass where what passes can be read or changed. It knows neither what is
done with it nor the layers that call it.

    embedding          [T D]  the tokens' embeddings
    block_input        [T D]  the residual stream as a layer gets it (of layer 0: the embedding)
    attention_output   [T D]  what a layer's attention adds to the stream
    mlp_output         [T D]  what its MLP adds
    final_norm         [T D]  the normed stream that the logits are made of
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

OF_MODEL = ("embedding", "final_norm")
IN_LAYERS = ("block_input", "attention_output", "mlp_output")
INSIDE = ("attention_output", "mlp_output")  # known to the layer alone


class Place(NamedTuple):
    """A point, and the layer it is of; none for those of the whole model."""

    point: str
    layer: int | None = None


Edit = Callable[[Place, Float[Array, "T D"]], Float[Array, "T D"]]


class Taps:
    """What is to be done in one forward pass: edits, in order, and then what is read."""

    def __init__(
        self,
        edits: Sequence[tuple[Collection[Place], Edit]] = (),
        reads: Collection[Place] = (),
    ):
        self._edits = edits
        self._reads = frozenset(reads)
        self.values: dict[Place, Float[Array, "T D"]] = {}  # what was read

    def __call__(
        self, point: str, layer: int | None, value: Float[Array, "T D"]
    ) -> Float[Array, "T D"]:
        """What goes on instead of the value."""
        place = Place(point, layer)
        for places, edit in self._edits:
            if place in places:
                value = edit(place, value)
        if place in self._reads:
            self.values[place] = value
        return value

    def look_inside(self, layer: int) -> bool:
        """Whether anything is to be done within this layer."""
        inside = {Place(point, layer) for point in INSIDE}
        return any(inside & set(places) for places in (self._reads, *(e[0] for e in self._edits)))


def hidden_state(index: int, num_layers: int) -> Place:
    """The place of `hidden_states[index]` as transformers numbers them: 0 is the embedding, and
    the last, `num_layers`, is normed."""
    return Place("final_norm") if index == num_layers else Place("block_input", index)
