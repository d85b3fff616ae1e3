"""What became of every row and token of the data, in numbers: nothing is dropped that is not counted here."""

from dataclasses import dataclass

from llamahome.units import show_count


@dataclass(frozen=True)
class Report:
    """Counts over one reading of the data; tokens and targets are those of training and held-out examples together."""

    format: str
    reason: str
    """Why the rows are believed to be in this format."""
    files: int
    rows: int
    kept: int
    """Rows that are trained or evaluated on."""
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
    """Training rows that are also in data.eval_path."""
    ignored_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What else should be known, in sentences."""

    @property
    def mean_tokens(self) -> float:
        """Tokens per example."""
        return self.tokens / max(1, self.train_examples + self.eval_examples)

    @property
    def lost_share(self) -> float:
        """Targets cut off or left out over those and the ones that are learned."""
        return self.cut_targets / max(1, self.cut_targets + self.targets)

    def lines(self) -> list[str]:
        """For people; a line for each thing that is not as one would hope."""
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        share = self.targets / max(1, self.tokens)
        lines = [
            f"{self.rows:,} rows in {files}, format {self.format}: {self.reason}",
            f"{self.train_examples:,} examples to train on, {self.eval_examples:,} held out; {show_count(self.tokens)} tokens, "
            f"{self.mean_tokens:,.0f} per example, {share:.0%} of them learned; longest {self.longest_tokens:,} ({self.longest_where})",
        ]
        cut = f"{self.cut_tokens:,} tokens lost, {self.cut_targets:,} of them targets, {self.lost_share:.1%} of all targets"
        lost = (
            (self.bad, "bad rows left out"),
            (self.overlong_truncated, f"rows cut to max_length: {cut}"),
            (self.overlong_dropped, f"rows longer than max_length left out: {cut}"),
            (self.split, "rows longer than max_length split"),
            (self.without_targets, "rows left out because nothing in them is learned"),
            (self.duplicates, "rows with the content of an earlier one"),
            (self.shared_with_eval, "rows to train on that are in the evaluation file too"),
            (len(self.ignored_files), f"data files not read: {', '.join(self.ignored_files[:3])}"),
        )
        one = {"bad rows": "bad row", "rows": "row", "data files": "data file"}
        for count, what in lost:
            plural = next(word for word in one if what.startswith(word))
            if count:
                lines.append(f"{count:,} {one[plural] + what.removeprefix(plural) if count == 1 else what}")
        return [*lines, *self.notes]
