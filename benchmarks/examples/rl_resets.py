"""A recurrent policy that is trained on rollouts in which episodes end and start.

An episode shows a cue, -1 or 1, in its first step only. Some steps later it asks for it, and the
agent is rewarded if its action names the cue: without memory it is right half of the time.

Two things are shown. The LSTM restarts inside a rollout with ``reset=episode_start``: bool
[T, B], True at the first step of an episode. Gymnasium reports the end of an episode, ``done``, at
its last step t, so that ``episode_start[t + 1] = done[t]``. And its state is carried from one
rollout to the next, because episodes go on across that border.

Prints the share of right answers as training goes on, and how far the outputs of one call for the
whole rollout are from those of the steps that were taken while acting. On the CPU they are equal.

    python -m benchmarks.examples.rl_resets --updates 100
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastlstm

STEPS = 16  # of a rollout; episodes have 4 to 8
DISCOUNT = 0.95


class Recall:
    """B copies of the task; a copy whose episode has ended goes on with a new one."""

    def __init__(self, copies: int) -> None:
        self.cue = torch.zeros(copies)
        self.left = torch.zeros(copies, dtype=torch.int64)  # steps before the question
        self.start = torch.ones(copies, dtype=torch.bool)
        self._restart()

    def _restart(self) -> None:
        self.cue = torch.where(self.start, torch.randint(2, self.cue.shape) * 2.0 - 1, self.cue)
        self.left = torch.where(self.start, torch.randint(3, 8, self.left.shape), self.left)

    def observe(self) -> Tensor:
        """float32 [B, 2]: the cue, in the first step only, and whether this is the question."""
        return torch.stack([self.cue * self.start, (self.left == 0).float()], 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Takes actions [B], 0 or 1; returns rewards [B] and done [B] of this step."""
        done = self.left == 0
        reward = torch.where(done, (action * 2 - 1) * self.cue, 0.0)
        self.left -= 1
        self.start = done
        self._restart()
        return reward, done


class Policy(nn.Module):
    """Observations [T, B, 2] to logits of the actions [T, B, 2] and values [T, B]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastlstm.LSTM(2, 32)
        self.actor, self.critic = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, seen: Tensor, hx: tuple[Tensor, Tensor], episode_start: Tensor) -> tuple:
        y, hx = self.lstm(seen, hx, reset=episode_start)
        return self.actor(y), self.critic(y)[..., 0], hx


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Trains; returns the share of right answers at the end and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=100, help="of the policy (default: 100)")
    parser.add_argument("--copies", type=int, default=64, help="of the task (default: 64)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    policy, task = Policy(), Recall(args.copies)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    hx = (torch.zeros(1, args.copies, 32), torch.zeros(1, args.copies, 32))
    share = difference = 0.0
    for update in range(1, args.updates + 1):
        first, rows = hx, []
        with torch.no_grad():
            for _ in range(STEPS):  # act: one step of all copies at a time
                seen, start = task.observe(), task.start
                logits, _, hx = policy(seen[None], hx, start[None])
                action = torch.distributions.Categorical(logits=logits[0]).sample()
                rows.append((seen, start, logits[0], action, *task.step(action)))
            _, (value,), _ = policy(task.observe()[None], hx, task.start[None])
        seen, start, acted, actions, rewards, done = map(torch.stack, zip(*rows, strict=True))

        returns = torch.empty_like(rewards)
        for t in reversed(range(STEPS)):
            returns[t] = value = rewards[t] + DISCOUNT * value * ~done[t]
        logits, values, _ = policy(seen, first, start)  # learn: one call for the whole rollout
        difference = max(difference, (logits - acted).abs().max().item())
        choice = torch.distributions.Categorical(logits=logits)
        advantages = returns - values
        gain = choice.log_prob(actions) * advantages.detach() + 0.01 * choice.entropy()
        optimizer.zero_grad()
        (0.5 * advantages.square() - gain).mean().backward()
        optimizer.step()

        share = (rewards[done] > 0).float().mean().item()
        if update % max(1, args.updates // 6) == 0:
            print(f"update {update:4}: {share:6.1%} of the answers are right")
    print(f"acting and learning differ by {difference:.1e} at most; chance is 50%")
    return share, difference


if __name__ == "__main__":
    main()
