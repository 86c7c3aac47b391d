// Two small charts: lines over time, and bars. Each says in words what it shows.
import {element, svg} from './dom.js';

const WIDTH = 300, HEIGHT = 100;

// The next of 1, 2, 5, 10, 20, ... above: axes that do not jump at every reading.
function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map(step => step * power).find(bound => bound >= value);
}

function frame(title, note) {
  const picture = svg('svg', {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img'});
  const top = element('span', {class: 'top'});
  const below = element('div', {class: 'axis', 'aria-hidden': 'true'});
  const legend = element('p', {class: 'legend'});
  const figure = element('figure', {},
    element('figcaption', {}, element('strong', {}, title), ...(note ? [' ', element('span', {class: 'note'}, note)] : [])),
    legend, element('div', {class: 'plot'}, top, picture), below);
  return {picture, top, below, legend, figure};
}

// `lines` are {name, format}, at most three. update(points, span): points are {time, values} with
// one value a line, NaN where there is none; the axis ends `span` seconds before the last.
export function lineChart(title, note, lines) {
  const {picture, top, below, legend, figure} = frame(title, note);
  const paths = lines.map((line, i) => svg('path', {class: `line line-${i}`}));
  const figures = lines.map(() => element('b', {}));
  picture.append(svg('path', {class: 'grid', d: `M0 ${HEIGHT / 2}H${WIDTH}`}), ...paths);
  lines.forEach((line, i) => {
    legend.append(element('span', {class: `key key-${i}`}, line.name ? `${line.name} ` : '', figures[i]));
  });
  below.append(element('span', {}, '5 minutes ago'), element('span', {}, 'now'));
  return {
    figure,
    update(points, span) {
      const all = points.flatMap(p => p.values).filter(Number.isFinite);
      const most = roundUp(Math.max(0, ...all));
      const end = points.length ? points.at(-1).time : 0;
      paths.forEach((path, i) => {
        let d = '', pen = 'M';
        for (const {time, values} of points) {
          if (!Number.isFinite(values[i])) {
            pen = 'M';
            continue;
          }
          const x = WIDTH * (1 - (end - time) / span), y = HEIGHT * (1 - values[i] / most);
          d += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
          // A point alone is a dot: a line to itself with round ends.
          d += pen === 'M' ? 'h0' : '';
          pen = 'L';
        }
        path.setAttribute('d', d);
      });
      const last = points.at(-1)?.values ?? [];
      lines.forEach((line, i) => { figures[i].textContent = line.format(last[i]); });
      top.textContent = lines[0].format(most);
      picture.setAttribute('aria-label', `${title}, last 5 minutes: ` + lines.map((line, i) => {
        const own = points.map(p => p.values[i]).filter(Number.isFinite);
        return `${line.name ?? ''} now ${line.format(last[i])}, most ${line.format(Math.max(...own))}`.trim();
      }).join('; '));
    },
  };
}

// update(bars, summary): bars are {name, value}.
export function barChart(title, note) {
  const {picture, top, below, legend, figure} = frame(title, note);
  return {
    figure,
    update(bars, summary) {
      const most = roundUp(Math.max(0, ...bars.map(bar => bar.value)));
      const width = WIDTH / Math.max(1, bars.length);
      picture.replaceChildren(...bars.map((bar, i) => {
        const height = HEIGHT * bar.value / most;
        return svg('rect', {class: 'bar', x: i * width + width * 0.15, y: HEIGHT - height, width: width * 0.7, height});
      }));
      below.replaceChildren(...bars.map(bar => element('span', {class: 'under'}, bar.name)));
      top.textContent = most.toLocaleString('en');
      legend.replaceChildren(element('b', {}, summary));
      picture.setAttribute('aria-label', `${title}: ${summary}. ` +
        bars.map(bar => `${bar.name}: ${bar.value.toLocaleString('en')}`).join(', '));
    },
  };
}
