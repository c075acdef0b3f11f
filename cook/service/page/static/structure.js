// The picture of the model's units: one row per layer, attention heads at the left, FFN dimensions at the right. A unit
// fades as its gate closes.

export function bytesOf(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

export class Structure {
  /** `place`: {canvas, output, table}. */
  constructor(place) {
    Object.assign(this, place);
    this.layers = new Map(); // layer -> {att, ffn: block's value, heads, dimff: values}
    this.context = this.canvas.getContext("2d");
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => (this.output.textContent = ""));
  }

  /** `stages`: [{groups, values}] in the order of the recipe; later stages replace what earlier ones have learned. */
  show(stages) {
    this.layers = new Map();
    this.hidden = undefined; // of the whole model
    for (const { groups, values } of stages) {
      let start = 0;
      for (const group of groups) {
        const part = values.subarray(start, start + group.units);
        start += group.units;
        if (group.kind === "hidden") {
          this.hidden = { values: part, members: 1 };
          continue;
        }
        const layer = this.layers.get(group.layer) ?? { att: 255, ffn: 255 };
        if (group.kind === "blocks") layer[group.site] = part[0];
        else layer[group.kind] = { values: part, members: group.members || 1 };
        this.layers.set(group.layer, layer);
      }
    }
    this.rows = [...this.layers.entries()].sort(([one], [other]) => one - other);
    this.draw();
    this.describe();
  }

  geometry() {
    const width = Math.max(200, this.canvas.parentElement.clientWidth);
    const height = this.rows.length > 40 ? 9 : this.rows.length > 20 ? 14 : 20;
    const label = 34;
    const heads = this.rows.some(([, layer]) => layer.heads);
    const dims = this.rows.some(([, layer]) => layer.dimff);
    const left = Math.round((width - label) * (heads && dims ? 0.34 : 0.5)) - 8;
    return { width, height, label, left, right: width - label - left - 16, top: 20 };
  }

  draw() {
    if (!this.rows?.length) return;
    const shape = this.geometry();
    const scale = window.devicePixelRatio || 1;
    const total = shape.top + this.rows.length * shape.height;
    this.canvas.width = shape.width * scale;
    this.canvas.height = total * scale;
    this.canvas.style.height = `${total}px`;
    const style = getComputedStyle(document.documentElement);
    const [open, closed, text] = ["--open", "--closed", "--soft"].map((name) => style.getPropertyValue(name).trim());
    const context = this.context;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, shape.width, total);
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = text;
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillText("Attention heads", shape.label, 8);
    context.fillText("FFN dimensions", shape.label + shape.left + 16, 8);
    context.textAlign = "right";
    this.rows.forEach(([number, layer], row) => {
      const top = shape.top + row * shape.height;
      context.globalAlpha = 1;
      context.fillStyle = text;
      if (shape.height >= 12 || row % 5 === 0) context.fillText(String(number), shape.label - 10, top + shape.height / 2);
      this.strip(layer.heads?.values, layer.att, shape.label, top, shape.left, shape.height, open, closed);
      this.strip(layer.dimff?.values, layer.ffn, shape.label + shape.left + 16, top, shape.right, shape.height, open, closed);
    });
    context.globalAlpha = 1;
  }

  /** A row of units; with more units than pixels, a pixel is the mean of its units. Without units: the whole block. */
  strip(values, block, left, top, width, height, open, closed) {
    const context = this.context;
    const units = values?.length ?? 1;
    const cells = Math.min(units, width);
    const gap = cells < width / 4 ? 1.5 : 0;
    for (let number = 0; number < cells; number += 1) {
      const from = Math.floor((number * units) / cells);
      const to = Math.max(from + 1, Math.floor(((number + 1) * units) / cells));
      let sum = 0;
      for (let unit = from; unit < to; unit += 1) sum += values ? values[unit] : 255;
      const value = ((sum / (to - from)) * block) / 65025;
      const x = left + (number * width) / cells;
      const size = [x, top + 1.5, width / cells - gap, height - 3];
      context.globalAlpha = 1;
      context.fillStyle = closed;
      context.fillRect(...size);
      context.globalAlpha = value;
      context.fillStyle = open;
      context.fillRect(...size);
    }
  }

  hover(event) {
    if (!this.rows?.length) return;
    const shape = this.geometry();
    const [x, y] = [event.offsetX, event.offsetY];
    const found = this.rows[Math.floor((y - shape.top) / shape.height)];
    if (!found) return;
    const isHeads = x < shape.label + shape.left + 8;
    const [number, layer] = found;
    const strip = isHeads ? layer.heads : layer.dimff;
    const share = isHeads ? (x - shape.label) / shape.left : (x - shape.label - shape.left - 16) / shape.right;
    const unit = strip && Math.floor(share * strip.values.length);
    if (!strip || unit < 0 || unit >= strip.values.length) {
      const block = isHeads ? layer.att : layer.ffn;
      this.output.textContent = `Layer ${number}, ${isHeads ? "attention" : "FFN"} block: ${percent(block)}`;
    } else {
      this.output.textContent = `Layer ${number}, ${isHeads ? "head unit" : "dimension"} ${unit}: ${percent(strip.values[unit])}`;
    }
  }

  describe() {
    const rows = this.rows.map(([number, layer]) => [number, percent(layer.att), kept(layer.heads), percent(layer.ffn), kept(layer.dimff)]);
    this.table.replaceChildren(
      ...rows.map((row) => {
        const made = document.createElement("tr");
        row.forEach((value, column) => {
          const cell = document.createElement(column ? "td" : "th");
          if (!column) cell.scope = "row";
          cell.textContent = value;
          made.append(cell);
        });
        return made;
      }),
    );
    const sum = (kind) => this.rows.reduce(([some, all], [, layer]) => counted(layer[kind], some, all), [0, 0]);
    const [heads, dims] = [sum("heads"), sum("dimff")];
    const parts = [`${this.rows.length} layers`];
    if (heads[1]) parts.push(`${heads[0]} of ${heads[1]} heads kept`);
    if (dims[1]) parts.push(`${dims[0]} of ${dims[1]} FFN dimensions kept`);
    const [hidden, hiddenSize] = counted(this.hidden);
    if (hiddenSize) parts.push(`${hidden} of ${hiddenSize} hidden dimensions kept`);
    this.canvas.setAttribute("aria-label", `Units of the model by layer: ${parts.join(", ")}`);
    let sumOfAll = 0;
    for (const [, layer] of this.rows) {
      for (const part of [layer.heads, layer.dimff]) part?.values.forEach((value) => (sumOfAll += value));
      sumOfAll += layer.att + layer.ffn;
    }
    this.canvas.dataset.sum = sumOfAll;
  }
}

function percent(value) {
  return `${Math.round(value / 2.55)}% kept`;
}

function counted(part, some = 0, all = 0) {
  if (!part) return [some, all];
  const open = part.values.reduce((sum, value) => sum + (value > 127 ? 1 : 0), 0);
  return [some + open * part.members, all + part.values.length * part.members];
}

function kept(part) {
  const [some, all] = counted(part);
  return part ? `${some} of ${all}` : "–";
}
