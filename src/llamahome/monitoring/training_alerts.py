"""Rules about the training itself: a loss that is not finite or jumps, clipping, over-fitting, a learning rate too low or too high, and
rewards that are equal within every group.

A line is one record of metrics: one step, unless monitoring.log_every says otherwise. A rule prefers silence to a false alarm: batches
differ, so each difference is compared with the noise of the lines.
"""

import math

from llamahome.monitoring.episodes import Average, Episode, Facts, Finding, Rule, Values, finite


class NotFinite:
    """A loss or gradient that is not a number."""

    name = "loss-not-finite"

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode()

    def observe(self, step: int, values: Values) -> Finding | None:
        """Begin at a value that is not finite; over at the next line with finite ones."""
        measured = [name for name in ("train/loss", "train/grad_norm", "eval/loss") if name in values]
        if not measured:
            return None
        wrong = [name for name in measured if finite(values, name) is None]
        if not self._episode.begins(bool(wrong), over=not wrong):
            return None
        what = {"train/loss": "the loss", "train/grad_norm": "the gradient", "eval/loss": "the held-out loss"}[wrong[0]]
        return f"{what} of step {step} is not finite", f"its rows are in events.jsonl; if it happens again: {self._facts.slower()}"


class Spike:
    """A loss far above the losses before it: at least half as much again, 0.1 nats, and eight times the mean deviation."""

    name = "loss-spike"
    _LINES = 20
    _DEVIATIONS = 8

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode()
        self._level, self._deviation = Average(20), Average(50)
        """Of the logarithm, because the noise of a loss grows and falls with it."""

    def observe(self, step: int, values: Values) -> Finding | None:
        """Compare with the level of the lines before; a spike hardly moves that level."""
        loss = finite(values, "train/loss")
        if loss is None:
            return None
        logarithm, level, spread = math.log(max(loss, 1e-6)), self._level.mean, max(self._deviation.mean, 0.01)
        above = logarithm - level
        bound = max(math.log(1.5), self._DEVIATIONS * spread)
        if self._level.count >= self._LINES:
            above = max(-3 * spread, min(3 * spread, above))
        jump = self._level.count >= self._LINES and logarithm - level > bound and loss - math.exp(level) > 0.1
        begins = self._episode.begins(jump, over=logarithm - level < bound / 2)
        if self._level.count:
            self._deviation.add(abs(above))
        self._level.add(level + above)
        if not begins:
            return None
        clip = self._facts.resume_with("training.max_grad_norm=1.0") if self._facts.max_grad_norm is None else self._facts.slower()
        return f"the loss jumped to {loss:.4g} at step {step}; it was {math.exp(level):.4g} before", f"if it stays high: {clip}"


class Clipping:
    """Gradients that are cut in nearly every step, to half or less on average."""

    name = "clipping"
    _LINES = 100

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode()
        self._share, self._norm = Average(50), Average(50)

    def observe(self, step: int, values: Values) -> Finding | None:
        """Begin at 97 % of the last 50 lines; over below 80 %."""
        norm, limit = finite(values, "train/grad_norm"), self._facts.max_grad_norm
        if norm is None or limit is None:
            return None
        self._share.add(float(norm > limit))
        self._norm.add(math.log(max(norm, 1e-12)))
        typical = math.exp(self._norm.mean)
        cut = self._share.count >= self._LINES and self._share.mean >= 0.97 and typical >= 2 * limit
        if not self._episode.begins(cut, over=self._share.mean < 0.8):
            return None
        text = f"nearly every gradient is scaled down: its norm is {typical:.3g}, training.max_grad_norm is {limit:g}"
        return text, f"{self._facts.slower()}; or, if the loss falls well, --set training.max_grad_norm={2 * typical:.2g}"


class Overfitting:
    """The held-out loss rises at two evaluations in a row while the training loss falls."""

    name = "overfitting"

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode(patience=2)
        self._training = Average(50)
        self._best = (math.inf, 0)
        self._training_then: float | None = None

    def observe(self, step: int, values: Values) -> Finding | None:
        """Compare an evaluation with the best one before it."""
        if (loss := finite(values, "train/loss")) is not None:
            self._training.add(loss)
            if self._training_then is None and self._training.count >= 5:
                self._training_then = self._training.mean
        if (held_out := finite(values, "eval/loss")) is None:
            return None
        (best, best_step), now, then = self._best, self._training.mean, self._training_then
        risen = held_out - best > max(0.02 * best, 0.01) and then is not None and now < 0.97 * then
        begins = self._episode.begins(risen, over=held_out < 1.01 * best)
        if held_out < best:
            self._best, self._training_then = (held_out, step), now if self._training.count >= 5 else None
        if not begins:
            return None
        rose = f"the held-out loss rose from {best:.4f} at step {best_step} to {held_out:.4f}"
        text = f"{rose}, the training loss fell from {then:.4f} to {now:.4f}"
        if not best_step:
            return text, self._facts.slower()
        return text, f"fewer steps: --max-steps {best_step}; or --set output.final=best, which takes the best saved step"


class RateTooLow:
    """A loss that is where it was before training, after a quarter of the run.

    The held-out loss decides where there is one, because it is measured on the same rows each time: less than 0.5 % of change. Otherwise
    the mean of the first 20 lines is compared, and the gain must be below 2 % whatever the noise.
    """

    name = "learning-rate-low"
    _LINES = 100

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode()
        self._first, self._now = Average(20), Average(50)
        self._untrained: float | None = None

    def observe(self, step: int, values: Values) -> Finding | None:
        """Compare with the beginning; a resumed run is not judged, because its beginning was elsewhere."""
        if self._facts.first_step:
            return None
        late = step >= max(20, self._facts.horizon / 4)
        if (held_out := finite(values, "eval/loss")) is not None:
            if step == 0:
                self._untrained = held_out
            elif self._untrained is not None and self._untrained > 0.1:
                flat = late and abs(held_out / self._untrained - 1) < 0.005
                if self._episode.begins(flat, over=not flat):
                    return self._finding(
                        f"the held-out loss was {self._untrained:.4f} before training and is {held_out:.4f} after step {step}"
                    )
        if (loss := finite(values, "train/loss")) is None:
            return None
        if self._first.count < 20:
            self._first.add(loss)
        self._now.add(loss)
        if self._untrained is not None or self._now.count < self._LINES or self._first.mean < 0.1:
            return None
        gain = self._first.mean - self._now.mean
        doubt = 2 * math.hypot(self._first.error, self._now.error)
        flat = late and abs(gain) + doubt < 0.02 * self._first.mean
        if self._episode.begins(flat, over=gain > 0.03 * self._first.mean):
            return self._finding(f"the loss was {self._first.mean:.4f} in the first steps and is {self._now.mean:.4f} around step {step}")
        return None

    def _finding(self, text: str) -> Finding:
        higher = self._facts.resume_with(f"training.learning_rate={10 * self._facts.learning_rate:.2g}")
        return text, f"the model may know these rows already; else the learning rate is too low: {higher}"


class RateTooHigh:
    """A loss that rises and stays up: 20 lines in a row a tenth above its lowest level, and more than the noise explains."""

    name = "learning-rate-high"

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode(patience=20)
        self._level = Average(30)
        self._lowest = (math.inf, 0.0, 0)
        """Upper bound of the lowest level, that level, and its step."""

    def observe(self, step: int, values: Values) -> Finding | None:
        """Compare the level of the last lines with the lowest one."""
        loss = finite(values, "train/loss")
        if loss is None:
            return None
        self._level.add(loss)
        if self._level.count < 8:
            return None
        now, error = self._level.mean, self._level.error
        bound, low, low_step = self._lowest
        rise = now - low
        high = rise > max(0.1 * low, 0.05) and now - 4 * error > bound
        begins = self._episode.begins(high and math.isfinite(bound), over=rise < 0.05 * low)
        if now + 3 * error < bound:
            self._lowest = (now + 3 * error, now, step)
        if not begins:
            return None
        return f"the loss rose from {low:.4f} around step {low_step} to {now:.4f} around step {step}", self._facts.slower()


class NoSpread:
    """Rewards of the first steps that never differ within a group: every advantage is 0, so nothing is learned."""

    name = "rewards-equal"
    _STEPS = 5

    def __init__(self, facts: Facts) -> None:
        self._facts, self._judged = facts, False

    def observe(self, step: int, values: Values) -> Finding | None:
        """Judge once, after the first steps: a later group without spread may be a prompt that the model has learned to solve."""
        share = finite(values, "train/groups_without_spread")
        if share is None or self._judged:
            return None
        if share == 1 and step < self._facts.first_step + self._STEPS:
            return None
        self._judged = True
        if share < 1:
            return None
        text = f"in all steps up to {step} the answers to a prompt got the same reward, so nothing is learned"
        mend = "a reward that tells answers to one prompt apart, such as part of the points for a part of the solution"
        return text, f"{mend}; or more different answers: a higher grpo.group_size or grpo.temperature"


def training_rules(facts: Facts) -> list[Rule]:
    """The rules of this file, for one run."""
    return [NotFinite(facts), Spike(facts), Clipping(facts), Overfitting(facts), RateTooLow(facts), RateTooHigh(facts), NoSpread(facts)]
