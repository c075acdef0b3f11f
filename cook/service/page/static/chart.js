// One line chart: uPlot in the colours of the page.

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export class Chart {
  /** `series`: [{label, colour: CSS variable, dash}]; `format`: a number as text. */
  constructor(holder, series, format) {
    this.holder = holder;
    this.series = series;
    this.format = format;
    this.data = [[], ...series.map(() => [])];
    this.name = holder.getAttribute("aria-label");
    this.queued = false;
    new ResizeObserver(() => this.resize()).observe(holder);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.build());
    this.build();
  }

  build() {
    this.plot?.destroy();
    const axis = {
      stroke: colour("--soft"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1, size: 4 },
      font: "12px system-ui, sans-serif",
    };
    const lines = this.series.map((one) => ({
      label: one.label,
      stroke: colour(one.colour),
      width: 2,
      dash: one.dash,
      points: { show: false },
      spanGaps: true,
      value: (_plot, value) => (value == null ? "–" : this.format(value)),
    }));
    const options = {
      ...this.size(),
      scales: { x: { time: false } },
      padding: [10, 10, 0, 0],
      cursor: { y: false, drag: { x: true, y: false }, points: { size: 7 } },
      legend: { markers: { width: 0, fill: (_plot, number) => colour(this.series[number - 1].colour) } },
      hooks: { setCursor: [(plot) => plot.cursor.idx == null && this.showLast()] },
      axes: [
        { ...axis, size: 30, space: 60, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] },
        { ...axis, size: 52, values: (_plot, values) => values.map((value) => this.format(value)) },
      ],
      series: [{ label: "Step", value: (_plot, value) => (value == null ? "–" : String(value)) }, ...lines],
    };
    this.plot = new window.uPlot(options, this.data, this.holder);
    this.showLast();
  }

  /** Without a pointer on the chart, the legend shows the newest values. */
  showLast() {
    const steps = this.data[0].length;
    if (steps) this.plot?.setLegend({ idx: steps - 1 }, false);
  }

  size() {
    return { width: Math.max(200, this.holder.clientWidth), height: 190 };
  }

  resize() {
    if (this.holder.clientWidth !== this.plot.width) this.plot.setSize(this.size());
  }

  /** `rows`: [[step, value of each series…], …]. Many calls cause one drawing per frame. */
  show(rows) {
    this.rows = rows;
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      this.data = [0, ...this.series.map((_, number) => number + 1)].map((column) => this.rows.map((row) => row[column] ?? null));
      this.plot.setData(this.data);
      if (this.plot.cursor.idx == null) this.showLast();
      this.describe();
    });
  }

  describe() {
    const last = this.rows.at(-1);
    const values = last && this.series.map((one, number) => `${one.label} ${last[number + 1] == null ? "unknown" : this.format(last[number + 1])}`);
    this.holder.setAttribute("aria-label", last ? `${this.name}; at step ${last[0]}: ${values.join(", ")}` : `${this.name}; no values yet`);
    this.holder.dataset.points = this.rows.length;
    this.holder.dataset.last = last ? last[0] : "";
  }
}
