// The models' table, and of one version its report and layers.
import {byId, bytes, element, filter, interval, number, percent, schemeOf, table} from './dom.js';
import {Reading} from './metrics.js';

export const keyOf = v => `${v.model}/${v.version}`;

let versions = [];
let rateCells = new Map();
let shown = null;  // the key of the version in the details
const applyFilter = filter(byId('models-filter'), () => [...byId('models-table').querySelectorAll('tbody tr')]);

export function showModels(list) {
  const focused = document.activeElement?.dataset?.version;
  versions = list;
  rateCells = new Map();
  byId('models-note').textContent = list.length ?
    (list.some(v => v.state === 'unavailable') ? 'Why a version is unavailable is in the log, and in "ternctl models".' : '') :
    'There are no models yet: "ternctl import" adds one.';
  byId('models-table').replaceChildren(...(list.length ? [table('Versions',
    ['Version', 'Report', 'State', 'Scheme', 'Bits', 'Size', 'Images/s', 'Top-1', 'Agrees with float'], list.map(cells))] : []));
  applyFilter();
  if (focused) document.querySelector(`button[data-version="${CSS.escape(focused)}"]`)?.focus();
  if (shown && !list.some(v => keyOf(v) === shown)) closeDetails();
}

function cells(v) {
  const rate = element('span', {}, '\u2013');
  rateCells.set(keyOf(v), rate);
  const name = element('span', {}, keyOf(v), ...(v.default ? [' ', element('span', {class: 'badge'}, 'default')] : []));
  const details = v.state !== 'ready' ? '' : element('button',
    {type: 'button', 'data-version': keyOf(v), 'aria-label': `Details of ${keyOf(v)}`}, 'Details');
  if (details) details.addEventListener('click', () => openDetails(v));
  return [name, details, element('span', {class: `state ${v.state}`}, v.state), schemeOf(v),
    v.scheme ? number(v.bits_per_weight) : '\u2013', v.bytes ? bytes(v.bytes) : '\u2013', rate,
    interval(v.report?.top1), interval(v.report?.agreement)];
}

// `rateOf` a version: images per second.
export function showRates(rateOf) {
  for (const v of versions) rateCells.get(keyOf(v)).textContent = number(rateOf(v));
}

function closeDetails() {
  shown = null;
  byId('details').hidden = true;
}

async function openDetails(v) {
  shown = keyOf(v);
  byId('details-title').textContent = `${shown}: report and layers`;
  byId('report').replaceChildren(...report(v));
  byId('layers').replaceChildren(element('p', {}, 'Loading the layers'));
  byId('details').hidden = false;
  byId('details-title').focus();
  let content;
  try {
    content = await layers(v);
  } catch (error) {
    content = [element('p', {class: 'error'}, `The layers cannot be shown: ${error.message}`)];
  }
  if (shown === keyOf(v)) byId('layers').replaceChildren(...content);
}

function report(v) {
  const r = v.report;
  if (!r) return [element('p', {}, 'This version has no accuracy report: Tern did not quantise it.')];
  const drop = r.drop && {value: r.drop.value, low: r.drop.low, high: r.drop.high};
  const images = p => (p ? ` on ${number(p.images)} images` : '');
  const rows = [
    ['Made from', `${r.source_model}/${r.source_version}`],
    ['Top-1', interval(r.top1) + images(r.top1)],
    ['Top-1 of the float network', interval(r.float_top1)],
    ['Loss of top-1', interval(drop)],
    ['Top-5', interval(r.top5)],
    ['Same answer as float', interval(r.agreement) + images(r.agreement)],
    ['The same on calibration images', interval(r.calibration_agreement) + images(r.calibration_agreement)],
    ['Compression', `${number(r.compression_ratio)} times, ${number(r.bits_per_weight)} bits per weight`],
    ['Multiplications removed', percent(r.multiplications_removed)],
    ['Time per image', `${number(r.ms_per_image)} ms, float ${number(r.float_ms_per_image)} ms (${r.isa}, one thread)`],
  ];
  const list = element('dl', {class: 'report'},
    ...rows.map(([name, text]) => element('div', {}, element('dt', {}, name), element('dd', {}, text))));
  if (!r.warnings.length) return [list];
  return [list, element('h3', {}, 'Warnings of the report'),
    element('ul', {}, ...r.warnings.map(warning => element('li', {}, warning)))];
}

async function get(path) {
  const answer = await fetch(path, {signal: AbortSignal.timeout(10000)});
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer;
}

async function layers(v) {
  const name = encodeURIComponent(v.model);
  const found = await (await get(`models/${name}/versions/${v.version}`)).json();
  // Only here: these are the most of all metrics.
  const reading = new Reading(await (await get('../metrics')).text(), 0);
  const own = labels => labels.model === v.model && labels.version === String(v.version);
  const total = reading.sum('tern_layer_duration_seconds_sum', own);
  const timeOf = layer => reading.sum('tern_layer_duration_seconds_sum', l => own(l) && l.layer === layer);
  const note = total > 0 ? 'Shares of the time are of the batches that were timed since the version was loaded.' :
    'Which layer takes how much of the time is not known: a server started with --profile_every=100 times every ' +
    'hundredth batch.';
  const columns = ['Layer', ...(total > 0 ? ['Time'] : []), 'Kind', 'Scheme', 'N', 'Bits', 'Implementation',
    'Million MACs', 'SQNR'];
  return [element('p', {}, note), table(`Layers of ${keyOf(v)}`, columns, found.layers.map(l => [
    element('code', {}, l.name), ...(total > 0 ? [percent(timeOf(l.name) / total)] : []), l.kind, l.scheme,
    number(l.cluster_size || NaN), number(l.bits_per_weight), element('code', {}, l.implementation),
    number(l.macs / 1e6 || NaN), Number.isFinite(l.sqnr_db) ? `${number(l.sqnr_db)} dB` : '\u2013',
  ]))];
}
