"""What became of every row and token of the data, in numbers: nothing is dropped that is not counted here."""

from dataclasses import dataclass, replace

from llamahome.data.store.counts import Counts
from llamahome.units import many, show_count


@dataclass(frozen=True)
class Report:
    """Counts over one reading of the data; tokens and targets are those of training and held-out examples together.

    When rows are streamed all but the counts of rows, held-out rows and duplicates are those of a sample.
    """

    format: str
    reason: str
    """Why the rows are believed to be in this format."""
    files: int
    rows: int
    kept: int
    """Rows that are trained or evaluated on."""
    examples: int
    train_examples: int
    eval_examples: int
    eval_rows: int
    """Rows held out, or rows of data.eval_path."""
    bad: int = 0
    overlong_truncated: int = 0
    overlong_dropped: int = 0
    split: int = 0
    without_targets: int = 0
    """Rows left out because nothing in them would be learned, for example when the whole answer was cut off."""
    tokens: int = 0
    targets: int = 0
    cut_tokens: int = 0
    cut_targets: int = 0
    longest_tokens: int = 0
    """Length of the longest row before it was cut."""
    longest_where: str = ""
    duplicates: int = 0
    """Rows whose content another row has too."""
    shared_with_eval: int = 0
    """Training rows that are also among the rows to evaluate on."""
    shared_example: str = ""
    """Places of one of them."""
    shared_apart: tuple[str, ...] = ()
    """Training rows that are also in splits that are left alone, in sentences."""
    system_merged: int = 0
    """Rows whose system text was written before the first question."""
    ignored_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What else should be known, in sentences."""
    sampled_rows: int = 0
    """Rows that were read to begin with when the others are streamed; 0 when all were read."""
    epoch_rows: int = 0
    """Rows that an epoch of training goes through."""
    mixture: tuple[str, ...] = ()
    """How often rows are seen, where data.mixture says so."""

    @property
    def mean_tokens(self) -> float:
        """Tokens per example."""
        return self.tokens / max(1, self.examples)

    @property
    def lost_share(self) -> float:
        """Targets cut off or left out over those and the ones that are learned."""
        return self.cut_targets / max(1, self.cut_targets + self.targets)

    @property
    def tokens_per_row(self) -> float:
        """Tokens of an average row, those without an example counted as 0."""
        return self.tokens / max(1, self.sampled_rows or self.rows)

    def with_held_out(self, examples: int, *, rows: int) -> "Report":
        """The same when `examples` of `rows` rows of it are held out; of a sample they are none."""
        train = self.train_examples - (0 if self.sampled_rows else examples)
        return replace(self, train_examples=train, eval_examples=examples, eval_rows=rows)

    def with_other(self, other: "Report") -> "Report":
        """The same together with rows to evaluate on from files of their own."""
        longest = max((self, other), key=lambda each: each.longest_tokens)
        summed = {
            name: getattr(self, name) + getattr(other, name) for name in _SUMMED if not self.sampled_rows or name in ("files", "rows")
        }
        return replace(
            self,
            **summed,
            eval_examples=other.examples,
            eval_rows=other.kept,
            longest_tokens=longest.longest_tokens,
            longest_where=longest.longest_where,
        )

    def lines(self) -> list[str]:
        """For people; a line for each thing that is not as one would hope."""
        share = self.targets / max(1, self.tokens)
        lines = [f"{many(self.rows, 'row')} in {many(self.files, 'file')}, format {self.format}: {self.reason}"]
        each = f"{self.mean_tokens:,.0f} per example, {share:.0%} of them learned; longest {self.longest_tokens:,} ({self.longest_where})"
        if self.sampled_rows:
            held = f"{many(self.eval_examples, 'example')} held out"
            lines.append(f"{many(self.epoch_rows, 'row')} to train on, tokenized while the model trains; {held}")
            lines.append(f"of {many(self.sampled_rows, 'row')}: {show_count(self.tokens)} tokens, {each}")
        else:
            held = f"{many(self.train_examples, 'example')} to train on, {self.eval_examples:,} held out"
            lines.append(f"{held}; {show_count(self.tokens)} tokens, {each}")
        lines += self.mixture
        return [*lines, *lost_lines(self), *self.shared_apart, *self.notes]


def lost_lines(counts: Report | Counts) -> list[str]:
    """A line for each thing that is not as one would hope, of a whole report or of the rows seen so far."""
    share = counts.cut_targets / max(1, counts.cut_targets + counts.targets)
    cut = f"{counts.cut_tokens:,} tokens lost, {counts.cut_targets:,} of them targets, {share:.1%} of all targets"
    lost: list[tuple[int, str]] = [(counts.bad, "bad rows left out")]
    if isinstance(counts, Report):
        lost.append((counts.overlong_truncated, f"rows cut to max_length: {cut}"))
        lost.append((counts.overlong_dropped, f"rows longer than max_length left out: {cut}"))
    else:
        lost.append((counts.truncated, f"rows cut to max_length: {cut}"))
        lost.append((counts.dropped, f"rows longer than max_length left out: {cut}"))
    lost.append((counts.split, "rows longer than max_length split"))
    lost.append((counts.without_targets, "rows left out because nothing in them is learned"))
    lost.append(
        (counts.system_merged, "rows with the system text before the first question, in the saved chat template too (model.system_role)")
    )
    if isinstance(counts, Report):
        lost.append((counts.duplicates, "rows with the content of an earlier one"))
        lost.append((counts.shared_with_eval, "rows to train on that are in the evaluation file too" + _for_example(counts)))
        lost.append((len(counts.ignored_files), f"data files not read: {', '.join(counts.ignored_files[:3])}"))
    return [f"{count:,} {what if count > 1 else _singular(what)}" for count, what in lost if count]


def _for_example(report: Report) -> str:
    return f", for example {report.shared_example}" if report.shared_example else ""


def _singular(what: str) -> str:
    many = next(word for word in _ONE if what.startswith(word))
    return _ONE[many] + what.removeprefix(many)


_ONE = {"bad rows": "bad row", "rows": "row", "data files": "data file"}

_SUMMED = (
    *("files", "rows", "kept", "examples", "bad", "overlong_truncated", "overlong_dropped", "split", "without_targets"),
    *("tokens", "targets", "cut_tokens", "cut_targets", "system_merged", "ignored_files"),
)
