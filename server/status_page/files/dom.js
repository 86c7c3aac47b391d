// Elements and text. Names come from others' files: they become text nodes and attribute values,
// never markup.

const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== undefined) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children);  // strings become text nodes
  return node;
}

export const element = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
export const byId = id => document.getElementById(id);

// What is not known is a dash.
const known = (value, text) => (Number.isFinite(value) ? text(value) : '\u2013');
const fixed = (value, digits) => value.toLocaleString('en', {maximumFractionDigits: digits});

export const number = value =>
  known(value, v => fixed(v, Math.abs(v) >= 100 ? 0 : Math.abs(v) >= 10 ? 1 : 2));
export const percent = value => known(value, v => `${fixed(100 * v, 1)} %`);
export const seconds = value => known(value, v => (v < 1 ? `${number(1000 * v)} ms` : `${number(v)} s`));
export const bytes = value => known(value, v => {
  const step = v < 1 ? 0 : Math.min(3, Math.floor(Math.log(v) / Math.log(1000)));
  return `${number(v / 1000 ** step)} ${['B', 'kB', 'MB', 'GB'][step]}`;
});
// Of {value, low, high}; a dash for none.
export const interval = p =>
  p ? `${percent(p.value)} (${fixed(100 * p.low, 1)} to ${fixed(100 * p.high, 1)})` : '\u2013';
export const schemeOf = v =>
  v.scheme ? v.scheme + (v.cluster_size ? ` N=${v.cluster_size}` : '') : '\u2013';

// A table that scrolls in a box of its own, so that the page never scrolls sideways. The first cell
// of a row is its header.
export function table(caption, columns, rows) {
  const row = cells => element('tr', {}, ...cells.map((cell, i) =>
    element(i ? 'td' : 'th', i ? {} : {scope: 'row'}, cell)));
  return element('div', {class: 'scroll', role: 'region', tabindex: '0', 'aria-label': caption},
    element('table', {},
      element('caption', {}, caption),
      element('thead', {}, element('tr', {}, ...columns.map(c => element('th', {scope: 'col'}, c)))),
      element('tbody', {}, ...rows.map(row))));
}

// Shows `label` if there are many `items()`, and hides those whose text lacks what is typed.
export function filter(label, items) {
  const input = label.querySelector('input');
  const apply = () => {
    const all = items();
    label.hidden = all.length <= 10;
    const wanted = label.hidden ? '' : input.value.trim().toLowerCase();
    for (const item of all) item.hidden = !item.textContent.toLowerCase().includes(wanted);
  };
  input.addEventListener('input', apply);
  return apply;
}
