"""Adam and L-BFGS. Those of torch.optim import torch._dynamo, a compiler that nothing here uses: 1.8 s at a start."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)  # of the running means of gradients and of their squares (the paper's)
EPSILON = 1e-8  # added to the root of the mean square
HISTORY = 20  # steps of L-BFGS that tell of the curvature
ENOUGH = 1e-4  # of the fall that the slope promises, which a step must bring (Armijo)
SHORTEST = 1e-6  # of the step that was meant: below it nothing falls any more


class Adam:
    """Adam (Kingma & Ba 2015, Algorithm 1), bit for bit what torch.optim.Adam computes on the CPU.

    steps: how many were taken; means, squares: running means of each parameter's gradients and of their squares.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.steps = 0
        self.means = [torch.zeros_like(each, requires_grad=False) for each in self.parameters]
        self.squares = [torch.zeros_like(each, requires_grad=False) for each in self.parameters]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move the parameters by their gradients, which are gone afterwards."""
        self.steps += 1
        size = learning_rate / (1 - BETAS[0] ** self.steps)
        root = (1 - BETAS[1] ** self.steps) ** 0.5
        for parameter, mean, square in zip(self.parameters, self.means, self.squares):
            gradient = parameter.grad
            assert gradient is not None  # every parameter of a head takes part in every loss
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            parameter.addcdiv_(mean, (square.sqrt() / root).add_(EPSILON), value=-size)
            parameter.grad = None

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        """What going on needs, besides the parameters."""
        return {"steps": self.steps, "means": self.means, "squares": self.squares}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state."""
        self.steps = state["steps"]
        for ours, saved in zip(self.means + self.squares, state["means"] + state["squares"]):
            ours.copy_(saved)


def lbfgs(
    evaluate: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, *, steps: int, fall: float
) -> Tensor:
    """The minimum of a smooth convex function, near enough (Liu & Nocedal 1989).

    evaluate: a point (n,) to its value and gradient (n,); at most so many steps, none after one that brought less than
    `fall`.
    """
    point = start
    value, gradient = evaluate(point)
    pairs: list[tuple[Tensor, Tensor]] = []  # of steps and of how the gradient changed
    for _ in range(steps):
        direction = _newton_direction(gradient, pairs)
        slope = float(direction @ gradient)  # below 0
        size = 1.0
        while True:
            further = point + size * direction
            next_value, next_gradient = evaluate(further)
            if next_value <= value + ENOUGH * size * slope:
                break
            size /= 2
            if size < SHORTEST:
                return point
        pair = (further - point, next_gradient - gradient)
        if pair[0] @ pair[1] > 0:
            pairs = [*pairs, pair][-HISTORY:]
        gained = value - next_value
        point = further
        value = next_value
        gradient = next_gradient
        if gained < fall:
            break
    return point


def _newton_direction(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Minus the gradient (n,), times the inverse of the curvature that pairs tell of (the two-loop recursion)."""
    if not pairs:
        return -gradient / max(1.0, float(gradient.norm()))
    direction = -gradient
    shares = []
    for moved, changed in reversed(pairs):
        share = (moved @ direction) / (moved @ changed)
        shares.append(share)
        direction = direction - share * changed
    moved, changed = pairs[-1]
    direction = direction * ((moved @ changed) / (changed @ changed))
    for (moved, changed), share in zip(pairs, reversed(shares)):
        direction = direction + (share - (changed @ direction) / (moved @ changed)) * moved
    return direction
