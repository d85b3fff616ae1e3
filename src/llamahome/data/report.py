"""Counts of what became of every row and token of the data; everything that is dropped is counted here."""

from dataclasses import dataclass, replace

from llamahome.data.store.counts import Counts
from llamahome.units import many, show_count


@dataclass(frozen=True)
class DataReport:
    """Counts over one reading of the data; tokens and targets are those of training and held-out examples together.

    If rows are streamed, all counts except those of rows, held-out rows and duplicates are of a sample.
    """

    format: str
    reason: str
    """Why the rows are taken to be in this format."""
    files: int
    rows: int
    kept: int
    """Rows to train or evaluate on."""
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
    """Rows left out because nothing in them would be learned, for example if the whole answer was cut off."""
    tokens: int = 0
    targets: int = 0
    references: int = 0
    """Tokens of answers that a reward reads and the model does not learn, with the end that stands for an answer that is not there."""
    cut_tokens: int = 0
    cut_targets: int = 0
    longest_tokens: int = 0
    """Length of the longest row before it was cut."""
    longest_where: str = ""
    duplicates: int = 0
    """Rows with the content of an earlier row."""
    shared_with_eval: int = 0
    """Training rows that are also among the rows to evaluate on."""
    shared_example: str = ""
    """Where one of them is, in both."""
    shared_apart: tuple[str, ...] = ()
    """A sentence for each split that is left alone and shares rows with the training rows."""
    system_merged: int = 0
    """Rows whose system text was written before the first question."""
    ignored_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Other sentences for people."""
    sampled_rows: int = 0
    """Rows that were read before training if the others are streamed; 0 if all were read."""
    epoch_rows: int = 0
    """Rows of an epoch of training."""
    mixture: tuple[str, ...] = ()
    """How often rows are seen, if data.mixture is set."""

    @property
    def row_examples(self) -> int:
        """Examples of each row, unless it is split: the two answers of a pair, else one."""
        return 2 if self.format == "preference" else 1

    @property
    def mean_tokens(self) -> float:
        """Tokens per example."""
        return self.tokens / max(1, self.examples)

    @property
    def answer_share(self) -> float:
        """Share of the tokens that is answers, learned or not."""
        return (self.targets + self.references) / max(1, self.tokens)

    @property
    def tokens_per_row(self) -> float:
        """Tokens of an average row; a row without an example counts as 0."""
        return self.tokens / max(1, self.sampled_rows or self.rows)

    def as_references(self) -> "DataReport":
        """The same report for an objective that learns from answers of the model: those of the rows are references."""
        return replace(self, targets=0, references=self.targets, cut_targets=0)

    def with_held_out(self, examples: int, *, rows: int) -> "DataReport":
        """The same report if `examples` of `rows` rows are held out; the examples of a sample stay."""
        train = self.train_examples - (0 if self.sampled_rows else examples)
        return replace(self, train_examples=train, eval_examples=examples, eval_rows=rows)

    def with_other(self, other: "DataReport") -> "DataReport":
        """The same report together with rows to evaluate on from other files."""
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
        """The report for people: totals, then a line for each kind of loss."""
        learned = f"{self.targets / max(1, self.tokens):.0%} of them" if not self.references else "answers of the model"
        lines = [f"{many(self.rows, 'row')} in {many(self.files, 'file')}, format {self.format}: {self.reason}"]
        what = "answer with its prompt" if self.row_examples == 2 else "example"
        each = f"{self.mean_tokens:,.0f} per {what}, {learned} learned; longest {self.longest_tokens:,} ({self.longest_where})"
        if self.sampled_rows:
            held = f"{many(self.eval_examples, 'example')} held out"
            lines.append(f"{many(self.epoch_rows, 'row')} to train on, tokenized while the model trains; {held}")
            lines.append(f"of {many(self.sampled_rows, 'row')}: {show_count(self.tokens)} tokens, {each}")
        else:
            each_row, noun = self.row_examples, "pair" if self.row_examples == 2 else "example"
            held = f"{many(self.train_examples // each_row, noun)} to train on, {self.eval_examples // each_row:,} held out"
            lines.append(f"{held}; {show_count(self.tokens)} tokens, {each}")
        lines += self.mixture
        return [*lines, *lost_lines(self, learned=not self.references), *self.shared_apart, *self.notes]


def lost_lines(counts: DataReport | Counts, *, learned: bool = True) -> list[str]:
    """A line for each kind of loss, of a whole report or of the rows seen so far; `learned` is whether the rows' answers are."""
    share = counts.cut_targets / max(1, counts.cut_targets + counts.targets)
    cut = f"{counts.cut_tokens:,} tokens lost"
    if learned:
        cut += f", {counts.cut_targets:,} of them targets, {share:.1%} of all targets"
    if isinstance(counts, DataReport):
        truncated, dropped = counts.overlong_truncated, counts.overlong_dropped
    else:
        truncated, dropped = counts.truncated, counts.dropped
    lost = [
        (counts.bad, "bad row", "left out"),
        (truncated, "row", f"cut to max_length: {cut}"),
        (dropped, "row", f"longer than max_length left out: {cut}"),
        (counts.split, "row", "longer than max_length split"),
        (
            counts.without_targets,
            "row",
            "left out with nothing to learn" if learned else "left out because max_length ends within their prompt",
        ),
        (counts.system_merged, "row", "with the system text before the first question, in the saved chat template too (model.system_role)"),
    ]
    if isinstance(counts, DataReport):
        example = f", for example {counts.shared_example}" if counts.shared_example else ""
        lost += [
            (counts.duplicates, "row", "with the content of an earlier one"),
            (counts.shared_with_eval, "row", f"to train on that are in the evaluation file too{example}"),
            (len(counts.ignored_files), "data file", f"not read: {', '.join(counts.ignored_files[:3])}"),
        ]
    return [f"{many(count, thing)} {what}" for count, thing, what in lost if count]


SAME_COUNTS = ("kept", "examples", "bad", "split", "without_targets", "tokens", "targets", "cut_tokens", "cut_targets", "system_merged")
"""Fields that mean what they mean in Counts."""
_SUMMED = ("files", "rows", "overlong_truncated", "overlong_dropped", "ignored_files", *SAME_COUNTS)
