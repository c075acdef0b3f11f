// The last lines of what an attempt has printed. A line that ends with a carriage return replaces itself, as in a
// terminal.

const MOST_LINES = 2000;

export class Output {
  constructor(pre, label) {
    this.pre = pre;
    this.label = label;
    this.restart();
  }

  /** Called when a new stream begins, which sends the output again. */
  restart() {
    this.attempt = null;
    this.lines = [""];
  }

  add({ attempt, text }) {
    if (attempt !== this.attempt) {
      this.attempt = attempt;
      this.lines = [""];
      this.label.textContent = `attempt ${attempt}`;
    }
    const clean = text.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "").replaceAll("\r\n", "\n");
    const [first, ...rest] = clean.split("\n");
    this.lines[this.lines.length - 1] += first;
    this.lines.push(...rest);
    this.lines = this.lines.slice(-MOST_LINES);
    this.draw();
  }

  draw() {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      const pre = this.pre;
      const atEnd = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 40;
      pre.textContent = this.lines.map((line) => line.replace(/\r+$/, "").replace(/^.*\r/, "")).join("\n");
      if (atEnd) pre.scrollTop = pre.scrollHeight;
    });
  }
}
