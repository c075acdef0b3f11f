// The list of jobs: its rows change as the jobs do, and new jobs appear on top.

import { duration, place, showTime, taken } from "/static/format.js";
import { $, follow, setText } from "/static/shell.js";

const table = $("jobs");
const body = table.tBodies[0];
const shown = table.dataset.state;
const MOST = 500; // rows

function cell(label, content) {
  const made = document.createElement("td");
  made.dataset.label = label;
  if (content) made.append(content);
  return made;
}

function newRow(job) {
  const row = document.createElement("tr");
  row.dataset.id = job.id;
  const head = document.createElement("th");
  head.scope = "row";
  const link = document.createElement("a");
  link.href = `/jobs/${job.id}`;
  link.textContent = job.name;
  const id = document.createElement("small");
  id.textContent = job.id;
  head.append(link, id);
  const state = document.createElement("span");
  state.className = "state";
  const created = document.createElement("time");
  showTime(created, job.created);
  const why = document.createElement("small");
  why.className = "why";
  const where = cell("State", state);
  where.append(why);
  row.append(head, where, cell("Where", place(job)), cell("Created", created), cell("Time"), cell("Owner", job.owner));
  return row;
}

function update(job) {
  let row = body.querySelector(`tr[data-id="${job.id}"]`);
  if (!row) {
    const first = body.rows[0]?.dataset.id ?? "";
    const fits = table.dataset.follow === "yes" && (!shown || job.state === shown);
    if (!fits || (first > job.id && body.rows.length >= 100)) return;
    row = newRow(job);
    const next = [...body.rows].find((other) => other.dataset.id < job.id); // ids are in the order of time
    body.insertBefore(row, next ?? null);
    if (body.rows.length > MOST) body.lastElementChild.remove();
    $("empty").hidden = true;
  }
  const state = row.querySelector(".state");
  state.dataset.state = job.state;
  setText(state, job.state);
  setText(row.querySelector(".why"), job.message.split("\n")[0]);
  const time = row.querySelector('[data-label="Time"]');
  time.dataset.started = job.started ?? "";
  time.dataset.ended = job.ended ?? "";
  tick(time);
}

function tick(time) {
  setText(time, duration(taken(time.dataset.started, time.dataset.ended)));
}

function tickAll() {
  body.querySelectorAll('[data-label="Time"]').forEach(tick);
}

body.querySelectorAll("time").forEach((time) => showTime(time));
$("state").addEventListener("change", (event) => event.target.form.submit());
tickAll();
setInterval(tickAll, 1000);
follow("", { job: update });
