// Reads the server's figures every two seconds and shows them.
import {barChart, lineChart} from './chart.js';
import {setLimits, setVersions, startClassify} from './classify.js';
import {byId, bytes, element, number, percent, seconds} from './dom.js';
import {Reading, buckets, increase, quantile, rate} from './metrics.js';
import {keyOf, showModels, showRates} from './models.js';

// Seconds.
const INTERVAL = 2;       // between readings, more where the server is slow to answer
const WINDOW = 10;        // of rates and percentiles; longer where readings are further apart
const BATCH_WINDOW = 60;  // of the batch sizes, and what is kept
const SPAN = 300;         // of the charts

const MODELS_EVERY = 5;   // readings

// A stream lasts as long as its client likes; these are single requests.
const isRequest = labels => ['Classify', 'ModelInfer', 'http.ModelInfer'].includes(labels.method);

const charts = {
  images: lineChart('Images per second', '', [{format: number}]),
  latency: lineChart('Latency', 'from request to answer',
    [{name: 'p99', format: seconds}, {name: 'p90', format: seconds}, {name: 'p50', format: seconds}]),
  batches: barChart('Batch sizes', 'in the last minute'),
  queue: lineChart('Queue', '',
    [{name: 'requests in flight', format: number}, {name: 'images waiting', format: number}]),
};
const tiles = new Map();

let readings = [];
let points = [];
let models = null, server = null;  // their JSON as text
let lostAt = null;
let paused = false;
let wake = () => {};

const now = () => performance.now() / 1000;
const clock = () => new Date().toLocaleTimeString('en-GB');

async function get(path) {
  const answer = await fetch(path, {signal: AbortSignal.timeout(10000)});
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.text();
}

function say(text, isLost = false) {
  const status = byId('connection');
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle('lost', isLost);
}

function tile(name, value) {
  if (!tiles.has(name)) {
    tiles.set(name, element('dd', {}));
    byId('tiles').append(element('div', {}, element('dt', {}, name), tiles.get(name)));
  }
  tiles.get(name).textContent = value;
}

async function readModels() {
  const [newServer, newModels] = await Promise.all([get('server'), get('models')]);
  const restarted = server !== null && server !== newServer;
  if (newServer !== server) {
    server = newServer;
    const about = JSON.parse(server);
    byId('server').textContent = `ternd ${about.version} at ${location.host}, up since ` +
      new Date(about.start_time * 1000).toLocaleString('en-GB');
    setLimits(about);
  }
  if (newModels !== models) {
    models = newModels;
    const {versions} = JSON.parse(models);
    showModels(versions);
    setVersions(versions);
  }
  return restarted;
}

function show(reading) {
  readings = [...readings.filter(r => r.time > reading.time - BATCH_WINDOW - INTERVAL), reading];
  const since = window => readings.findLast(r => r.time <= reading.time - window) ?? readings[0];
  const before = since(WINDOW);
  const has = before !== reading;
  const latencies = has ? buckets(before, reading, 'tern_request_duration_seconds', isRequest) : [];
  const [p50, p90, p99] = [0.5, 0.9, 0.99].map(q => quantile(q, latencies));
  const per = (name, where) => (has ? rate(before, reading, name, where) : NaN);
  const images = per('tern_images_total');
  const inFlight = reading.sum('tern_inflight_requests');
  const waiting = reading.sum('tern_queue_depth') + reading.sum('tern_decode_queue_depth');

  tile('Images/s', number(images));
  tile('p50', seconds(p50));
  tile('p99', seconds(p99));
  tile('In flight', number(inFlight));
  tile('Waiting', number(waiting));
  tile('Refused/s', number(per('tern_rejected_total')));
  tile('Errors/s', number(per('tern_requests_total', l => l.code !== 'OK')));
  tile('CPU', percent(per('process_cpu_seconds_total') / reading.sum('tern_cpu_budget_threads')));
  tile('Memory', bytes(reading.sum('process_resident_memory_bytes')));

  addPoint({time: reading.time, images, latency: [p99, p90, p50], queue: [inFlight, waiting]});
  const batches = buckets(since(BATCH_WINDOW), reading, 'tern_batch_size').filter(b => Number.isFinite(b.le));
  const used = batches.slice(0, Math.max(4, batches.findLastIndex(b => b.count > 0) + 1));
  const counted = used.reduce((sum, b) => sum + b.count, 0);
  const batchImages = increase(since(BATCH_WINDOW), reading, 'tern_batch_size_sum');
  charts.batches.update(used.map((b, i) => ({
    name: i && used[i - 1].le + 1 < b.le ? `${used[i - 1].le + 1}\u2013${b.le}` : String(b.le), value: b.count,
  })), counted ? `mean ${number(batchImages / counted)}` : 'none');
  showRates(v => per('tern_images_total', l => l.model === v.model && l.version === String(v.version)));
}

function addPoint(point) {
  points = [...points.filter(p => p.time > point.time - SPAN), point];
  const of = values => points.map(p => ({time: p.time, values: values(p)}));
  charts.images.update(of(p => [p.images]), SPAN);
  charts.latency.update(of(p => p.latency), SPAN);
  charts.queue.update(of(p => p.queue), SPAN);
}

// One reading. Where the server does not answer, the charts have a gap.
async function step(count) {
  try {
    const text = await get('metrics');
    const time = now();
    let restarted = false;
    if (lostAt || count % MODELS_EVERY === 0 || server === null) restarted = await readModels();
    if (restarted) {
      readings = [];
      say(`The server was started again (${clock()})`);
    } else if (lostAt) {
      say(`Connected again (${clock()})`);
    } else if (!/again/.test(byId('connection').textContent) || count % 30 === 0) {
      say('Connected');
    }
    lostAt = null;
    if (paused) say('Paused');  // while this was under way
    show(new Reading(text, time));
  } catch (error) {
    lostAt ??= clock();
    readings = [];
    say(`No answer since ${lostAt}; trying again`, true);
    addPoint({time: now(), images: NaN, latency: [NaN, NaN, NaN], queue: [NaN, NaN]});
  }
}

async function run() {
  for (let count = 0; ; ++count) {
    while (paused || document.hidden) await new Promise(resolve => { wake = resolve; });
    const began = now();
    await step(count);
    // A server that takes long to answer is not asked more than a tenth of the time.
    const wait = Math.max(INTERVAL - (now() - began), 10 * (now() - began));
    await new Promise(resolve => setTimeout(resolve, 1000 * Math.min(30, wait)));
  }
}

byId('charts').append(...Object.values(charts).map(chart => chart.figure));
byId('pause').addEventListener('click', event => {
  paused = !paused;
  event.target.setAttribute('aria-pressed', String(paused));
  if (paused) say('Paused');
  wake();
});
document.addEventListener('visibilitychange', () => wake());
startClassify();
run();
