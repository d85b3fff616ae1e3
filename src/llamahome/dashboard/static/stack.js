// Curves that are parts of a whole, as columns with the same places, because some steps lack a part.

// With `shares` each value is its share of the sum at its place.
export function together(curves, shares) {
  const x = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  const known = curves.map((curve) => new Map(curve.x.map((place, at) => [place, curve.y[at]])));
  const columns = known.map((values) => x.map((place) => values.get(place) ?? null));
  const sums = x.map((_, at) => columns.reduce((sum, column) => sum + (column[at] ?? 0), 0));
  const share = (value, at) => (value === null || !sums[at] ? value : value / sums[at]);
  return columns.map((y) => ({ x, y: shares ? y.map(share) : y }));
}

// What uPlot draws: the top of the stack comes first, so that each part covers what is above the one below it.
export function stacked(columns) {
  const x = columns.length ? columns[0].x : [];
  let sums = new Array(x.length).fill(0);
  const tops = columns.map((column) => (sums = sums.map((sum, at) => sum + (column.y[at] ?? 0))));
  return [x, ...tops.reverse()];
}
