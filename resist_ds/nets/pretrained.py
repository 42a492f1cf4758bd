"""The workers' first values from a file of plain timm weights: an export of ours, or anybody's."""

from collections.abc import Mapping
from pathlib import Path

from resist_ds.errors import UserError
from resist_ds.nets.blueprint import CIFAR_NETS, TESTED, Blueprint, shapes_of
from resist_ds.nets.initial import Piece
from resist_ds.nets.weights import Weights

FOLDED = "residual_scale_folded"  # metadata of an exported file: "true" or "false"
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Pretrained:
    """A file of plain timm weights, whose pool blocks are all active at once.

    In training only K of P are, and at test time each residual is scaled by K/P. So the branches are divided
    by K/P here, and the global model that training starts from is, at test time, the model in the file. Its
    BatchNorm statistics are not needed.

    Args:
        scale: K/P of the first round.

    Attributes:
        renewed: names of the parameters that start anew: a classifier of another size.
        remarks: what the user should know.

    Raises:
        UserError: the file cannot be read, or it is not of this model; later, NaN or Inf is in it.
    """

    def __init__(self, path: Path, blueprint: Blueprint, seed: int, scale: float):
        self._blueprint = blueprint
        self._seed = seed
        self._weights = weights = Weights(path)
        _find_net(weights, blueprint)
        self._scale = scale if weights.metadata.get(FOLDED, "true") == "true" else 1.0
        there, expected = weights.shapes, blueprint.shapes
        self.renewed = tuple(n for n in blueprint.head if there.get(n) != expected[n])
        wrong = [n for n in expected if n not in self.renewed and there.get(n) != expected[n]]
        if wrong:
            has = f"{list(there[wrong[0]])}, and" if wrong[0] in there else "missing, and"
            raise UserError(
                f"--from_pretrained {path} is not of --model {blueprint.name}: {wrong[0]} is {has} the "
                f"model has {list(expected[wrong[0]])}{_whose(weights, expected)}"
            )
        for name in there.keys() - expected.keys():
            if not name.endswith(_BUFFERS):
                raise UserError(
                    f"--from_pretrained {path} is not of --model {blueprint.name}, which has no {name}"
                )
        self.remarks = [weights.remark] if weights.remark else []
        if self.renewed:
            why = "has another size" if any(n in there for n in self.renewed) else "is missing"
            self.renewed = blueprint.head  # a bias without its weight would make no sense
            self.remarks.append(f"{' and '.join(self.renewed)} start anew: the file's head {why}")

    def shared(self) -> Piece:
        fresh = self._blueprint.initial_shared(self._seed) if self.renewed else {}
        for name, _ in self._blueprint.shared:
            yield name, {"parameter": fresh[name] if name in self.renewed else self._weights.tensor(name)}

    def block(self, block: int) -> Piece:
        for name, _ in self._blueprint.block:
            # A copy: the file may be mapped, and folding writes.
            tensor = self._weights.tensor(self._blueprint.block_prefix(block) + name).clone()
            self._blueprint.fold({name: tensor}, 1 / self._scale)
            yield name, {"parameter": tensor}

    def close(self) -> None:
        """Close the file."""
        self._weights.close()


def _find_net(weights: Weights, blueprint: Blueprint) -> None:
    """Take off what stands before the names of a net that is part of another: `model.`, `backbone.`."""
    body = {name: shape for name, shape in blueprint.shapes.items() if name not in blueprint.head}
    if body.keys() <= weights.shapes.keys():
        return
    first = next(iter(body))
    prefixes = sorted(n.removesuffix(first) for n in weights.shapes if n.endswith(f".{first}"))
    fitting = [p for p in prefixes if all(weights.shapes.get(p + n) == shape for n, shape in body.items())]
    if len(fitting) > 1:
        raise UserError(
            f"--from_pretrained {weights.path} holds several nets ({', '.join(fitting)}): write one of them "
            "into a file of its own"
        )
    if fitting:
        weights.take_off(fitting[0])


def _whose(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Of which net the file is instead, as far as can be told."""
    if sum(weights.shapes.get(n) == shape for n, shape in expected.items()) > len(expected) // 2:
        return ""
    says = weights.metadata.get("model")
    if says:
        return f"; it was exported from --model {says}"
    for name in (*TESTED, *CIFAR_NETS):
        shapes = shapes_of(name)
        body = list(shapes.items())[:-2]  # without the classifier's weight and bias
        if all(weights.shapes.get(n) == shape for n, shape in body):
            return f"; its tensors are those of --model {name}"
    return ""
