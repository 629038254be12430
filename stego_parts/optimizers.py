"""Adam (Kingma & Ba 2015, Algorithm 1), bit for bit what torch.optim.Adam computes on the CPU.

That one imports torch._dynamo, a compiler that nothing here uses, when it is made: 1.8 s of the seconds of a fit.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)  # of the running means of gradients and of their squares (the paper's)
EPSILON = 1e-8  # added to the root of the mean square


class Adam:
    """Moves parameters against their gradients, by steps of their own size.

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
