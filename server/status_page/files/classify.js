// One image, classified by the chosen versions one after another, so that they do not wait for each
// other. The token lives in this module's memory and nowhere else.
import {byId, bytes, element, filter, number, percent, schemeOf, seconds} from './dom.js';
import {keyOf} from './models.js';

const TOP = 5, CHOSEN_AT_FIRST = 4;

let versions = [];
let chosen = null;  // keys, once there was a version to choose
let limits = {};
let image = null;   // the File
let token = '';
let running = null;  // AbortController

const applyFilter = filter(byId('pick-filter'), () => [...byId('pick').children]);

export function setLimits(server) {
  limits = server;
  byId('limits').textContent = `JPEG, PNG, WebP or BMP, at most ${bytes(server.max_image_bytes)} and ` +
    `${number(server.max_pixels / 1e6)} million pixels. It is sent to this server only and not kept.`;
}

export function setVersions(list) {
  versions = list.filter(v => v.state === 'ready');
  const keys = versions.map(keyOf);
  if (!chosen && versions.length) {
    const first = versions.find(v => v.default) ?? versions[0];
    const others = versions.filter(v => v.model === first.model && v !== first);
    chosen = new Set([first, ...others].slice(0, CHOSEN_AT_FIRST).map(keyOf));
  }
  if (chosen) chosen = new Set([...chosen].filter(key => keys.includes(key)));
  const focused = document.activeElement?.value;
  byId('pick').replaceChildren(...versions.map(v => {
    const box = element('input', {type: 'checkbox', value: keyOf(v), checked: chosen.has(keyOf(v))});
    box.addEventListener('change', () => chosen[box.checked ? 'add' : 'delete'](box.value));
    if (focused === box.value) queueMicrotask(() => box.focus());
    return element('label', {}, box, ` ${keyOf(v)} `, element('small', {}, schemeOf(v)));
  }));
  if (!versions.length) byId('pick').append(element('p', {}, 'No version is ready.'));
  applyFilter();
}

function say(text, isError = false) {
  byId('verdict').textContent = text;
  byId('verdict').className = isError ? 'error' : '';
}

function choose(file) {
  if (!file) return;
  running?.abort();
  byId('answers').replaceChildren();
  const picture = byId('picture');
  URL.revokeObjectURL(picture.src);
  picture.hidden = true;
  image = null;
  if (file.size === 0) return say(`${file.name} is empty.`, true);
  if (file.size > limits.max_image_bytes) {
    return say(`${file.name} has ${bytes(file.size)}; the limit is ${bytes(limits.max_image_bytes)}. It was not sent.`, true);
  }
  image = file;
  picture.src = URL.createObjectURL(file);
  picture.alt = `The chosen image, ${file.name}`;
  classify();
}

// The binary form of the protocol: JSON, then the length and the bytes of the image.
function request() {
  const json = new TextEncoder().encode(JSON.stringify({
    inputs: [{name: 'image', datatype: 'BYTES', shape: [1], parameters: {binary_data_size: 4 + image.size}}],
    outputs: [{name: 'probabilities', parameters: {classification: TOP}}],
  }));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, image.size, true);
  const headers = {'Inference-Header-Content-Length': String(json.length)};
  if (token) headers.Authorization = `Bearer ${token}`;
  return {method: 'POST', headers, body: new Blob([json, length, image])};
}

async function ask(v, signal) {
  const began = performance.now();
  const answer = await fetch(`../v2/models/${encodeURIComponent(v.model)}/versions/${v.version}/infer`,
    {...request(), signal});
  const content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.error), {status: answer.status});
  return {
    version: v,
    roundTrip: (performance.now() - began) / 1000,
    timing: content.parameters,
    classes: content.outputs[0].data.map(text => {
      const [, probability, index, label] = /^([^:]*):(\d+):?(.*)$/s.exec(text);
      return {probability: Number(probability), label: label || `class ${index}`};
    }),
  };
}

async function classify() {
  running?.abort();
  if (!image) return;
  running = new AbortController();
  const signal = running.signal;
  const wanted = versions.filter(v => chosen.has(keyOf(v)));
  const answers = byId('answers');
  answers.replaceChildren();
  byId('token-form').hidden = true;
  if (!wanted.length) return say('Choose at least one version.', true);
  say(`Asking ${wanted.length === 1 ? keyOf(wanted[0]) : `${wanted.length} versions`}`);
  const results = [];
  for (const v of wanted) {
    try {
      const result = await ask(v, signal);
      results.push(result);
      answers.append(card(result, results[0]));
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401) return askForToken(error.message);
      answers.append(element('article', {}, heading(v), element('p', {class: 'error'}, error.message)));
    }
  }
  say(verdict(results, wanted.length - results.length), results.length === 0);
}

const heading = v => element('h3', {}, keyOf(v), ' ', element('small', {}, schemeOf(v)));

function card(result, reference) {
  const {classes, timing} = result;
  const bars = classes.map(c => {
    const bar = element('meter', {min: '0', max: '1', value: String(c.probability), 'aria-hidden': 'true'});
    return element('li', {}, element('span', {class: 'label'}, c.label), ' ',
      element('span', {class: 'probability'}, percent(c.probability)), bar);
  });
  const common = classes.filter(c => reference.classes.some(r => r.label === c.label)).length;
  const same = classes[0].label === reference.classes[0].label;
  return element('article', {}, heading(result.version), element('ol', {}, ...bars),
    element('p', {class: 'note'}, `Server ${seconds(timing.total_us / 1e6)}, of which inference ` +
      `${seconds(timing.inference_us / 1e6)}; round trip ${seconds(result.roundTrip)}`),
    ...(result === reference ? [] : [element('p', {class: same ? 'same' : 'other'},
      `${same ? 'Same answer as' : 'Another answer than'} ${keyOf(reference.version)}, ${common} of ` +
      `${classes.length} classes in common`)]));
}

function verdict(results, failed) {
  const said = new Map();
  for (const r of results) said.set(r.classes[0].label, [...(said.get(r.classes[0].label) ?? []), keyOf(r.version)]);
  const answers = [...said].map(([label, keys]) => `${keys.join(', ')}: ${label}`).join('; ');
  const failures = failed ? ` ${failed} failed.` : '';
  if (results.length === 0) return 'No version answered.';
  if (said.size > 1) return `The versions differ. ${answers}.${failures}`;
  return (results.length > 1 ? `All ${results.length} versions say ${[...said.keys()][0]}.` : `${answers}.`) + failures;
}

function askForToken(message) {
  say(token ? `The token was refused: ${message}` : 'The server asks for a token.', true);
  byId('token-form').hidden = false;
  byId('token-plain').hidden = isSecureContext;
  byId('token').focus();
}

export function startClassify() {
  const file = byId('file');
  file.addEventListener('change', () => {
    choose(file.files[0]);
    file.value = '';  // so that the same file can be chosen again
  });
  byId('picture').addEventListener('load', () => { byId('picture').hidden = false; });
  byId('pick').addEventListener('change', classify);
  byId('token-form').addEventListener('submit', event => {
    event.preventDefault();
    token = byId('token').value.trim();
    byId('token').value = '';
    classify();
  });
  const isFile = event => event.dataTransfer?.types.includes('Files');
  const mark = on => byId('drop').classList.toggle('over', on);
  addEventListener('dragover', event => {
    if (!isFile(event)) return;
    event.preventDefault();
    mark(true);
  });
  addEventListener('dragleave', event => { if (!event.relatedTarget) mark(false); });
  addEventListener('drop', event => {
    if (!isFile(event)) return;
    event.preventDefault();
    mark(false);
    choose(event.dataTransfer.files[0]);
    byId('classify').scrollIntoView();
  });
}
