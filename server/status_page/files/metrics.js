// The Prometheus text format, and what follows from two readings of it.

const ESCAPES = {n: '\n', '"': '"', '\\': '\\'};

// One reading: series by metric, in the order of the text.
export class Reading {
  constructor(text, time) {
    this.time = time;  // seconds, any origin
    this.metrics = new Map();
    this.values = new Map();
    for (const line of text.split('\n')) {
      const found = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
      if (!found) continue;  // comments, and the end
      const [, name, labelText = '', valueText] = found;
      const labels = {};
      for (const [, label, value] of labelText.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
        labels[label] = value.replace(/\\(.)/g, (all, c) => ESCAPES[c] ?? all);
      }
      const series = {key: `${name}{${labelText}}`, labels, value: toNumber(valueText)};
      if (!this.metrics.has(name)) this.metrics.set(name, []);
      this.metrics.get(name).push(series);
      this.values.set(series.key, series.value);
    }
  }

  series(name, where = () => true) {
    return (this.metrics.get(name) ?? []).filter(s => where(s.labels));
  }

  sum(name, where) {
    return this.series(name, where).reduce((total, s) => total + s.value, 0);
  }
}

function toNumber(text) {
  return Number(text.replace('Inf', 'Infinity'));
}

// How much a series of `later` grew; one that fell, or is new, has started at 0.
function growth(earlier, series) {
  const before = earlier.values.get(series.key) ?? 0;
  return series.value >= before ? series.value - before : series.value;
}

// What a counter grew by between two readings, all series that `where` takes together.
export function increase(earlier, later, name, where) {
  return later.series(name, where).reduce((total, s) => total + growth(earlier, s), 0);
}

// Per second.
export function rate(earlier, later, name, where) {
  return increase(earlier, later, name, where) / (later.time - earlier.time);
}

// Of a histogram: [{le, count}] by rising bound, counts of each bucket alone.
export function buckets(earlier, later, name, where) {
  const cumulative = new Map();
  for (const s of later.series(`${name}_bucket`, where)) {
    const le = toNumber(s.labels.le);
    cumulative.set(le, (cumulative.get(le) ?? 0) + growth(earlier, s));
  }
  let below = 0;
  return [...cumulative].sort((a, b) => a[0] - b[0]).map(([le, upTo]) => {
    const count = Math.max(0, upTo - below);
    below = upTo;
    return {le, count};
  });
}

// As Prometheus' histogram_quantile: linear within a bucket; beyond the last bound, that bound. NaN
// if nothing was counted.
export function quantile(q, histogram) {
  const total = histogram.reduce((sum, b) => sum + b.count, 0);
  if (total === 0) return NaN;
  const rank = q * total;
  let below = 0, bound = 0;
  for (const {le, count} of histogram) {
    if (!Number.isFinite(le)) return bound;
    if (count > 0 && below + count >= rank) return bound + (le - bound) * (rank - below) / count;
    below += count;
    bound = le;
  }
  return bound;
}
