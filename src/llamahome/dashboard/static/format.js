// Numbers as people read them. The same units as the terminal.

export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: size < 10 ? 4 : size < 1000 ? 2 : 0 });
}

// The same with as many digits for every value of a kind, so that a column of them is aligned.
export function figure(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size < 1000 && (size >= 1e-3 || size === 0) ? value.toFixed(4) : number(value);
}

export function count(value) {
  if (!Number.isFinite(value)) return "–";
  for (const [letter, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (Math.abs(value) >= size) return `${trimmed(value / size)} ${letter}`;
  }
  return trimmed(value);
}

export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (Math.abs(value) >= size) return `${trimmed(value / size)} ${unit}`;
  }
  return `${trimmed(value)} B`;
}

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value >= 86400) return `${trimmed(value / 86400)} d`;
  if (value >= 3600) return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
  if (value >= 60) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return value >= 0.1 || value === 0 ? `${trimmed(value)} s` : `${trimmed(value * 1000)} ms`;
}

// 1:05, 1:02:05: short enough for an axis.
function clock(value) {
  const whole = Math.round(Math.abs(value));
  const two = (part) => String(part).padStart(2, "0");
  const minutes = Math.floor(whole / 60) % 60;
  const hours = Math.floor(whole / 3600);
  return `${value < 0 ? "−" : ""}${hours ? `${hours}:${two(minutes)}` : minutes}:${two(whole % 60)}`;
}

const share = (value) => (Number.isFinite(value) ? `${trimmed(value * 100)} %` : "–");
const small = (value) => (Number.isFinite(value) ? (value === 0 ? "0" : value.toExponential(2).replace("e-", "e−")) : "–");

function trimmed(value) {
  const size = Math.abs(value);
  return value.toLocaleString("en", { maximumFractionDigits: size < 10 ? 2 : size < 100 ? 1 : 0 });
}

export const formats = { number, small, count, bytes, share, seconds };
// What axes write, and what legends, tables and figures write.
export const exactFormats = { ...formats, number: figure };
export const axisFormats = { step: count, tokens: count, time: clock };
