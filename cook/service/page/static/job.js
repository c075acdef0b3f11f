// The page of one job. Everything that it shows comes from one event stream, so a reload shows the same again.

import { Chart } from "/static/chart.js";
import { count, duration, showTime, size } from "/static/format.js";
import { Output } from "/static/output.js";
import { $, follow, send, setText } from "/static/shell.js";
import { Structure, bytesOf } from "/static/structure.js";

const id = $("job").dataset.id;
const here = `/v1/jobs/${id}`;
const plan = [...$("stages").children].map((item) => ({
  name: item.dataset.stage,
  steps: Number(item.dataset.steps),
  tokens: Number(item.dataset.tokens),
  item,
}));
const order = plan.map((stage) => stage.name);
const curves = new Map(); // stage -> records of steps
const groups = new Map(); // stage -> promise of the groups of its gates
const gates = new Map(); // stage -> {step, values}
let job = null;
let chosen = decodeURIComponent(location.hash.slice(1)); // a stage that the user has picked; else the newest one

const short = (value) => (Math.abs(value) >= 1000 ? count(value) : String(Number(value.toPrecision(4))));
const charts = {
  loss: new Chart($("loss-chart"), [
    { label: "Training", colour: "--one" },
    { label: "Held out", colour: "--two", dash: [2, 4] },
  ], short),
  sparsity: new Chart($("sparsity-chart"), [
    { label: "Expected", colour: "--one" },
    { label: "Target", colour: "--two", dash: [6, 4] },
  ], (value) => `${(100 * value).toFixed(value && value < 0.1 ? 1 : 0)}%`),
  speed: new Chart($("speed-chart"), [{ label: "Tokens/s", colour: "--one" }], count),
};
const structure = new Structure({
  canvas: $("structure"),
  output: $("structure-hover"),
  table: $("structure-table").tBodies[0],
});
const output = new Output($("log"), $("log-attempt"));

function mean(values) {
  const numbers = Object.values(values ?? {}).filter((value) => typeof value === "number");
  return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null;
}

function newest() {
  return order.filter((stage) => curves.get(stage)?.length).at(-1) ?? order[0];
}

function current() {
  return order.includes(chosen) ? chosen : newest();
}

let queued = false;
function redraw() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    const rows = curves.get(current()) ?? [];
    charts.loss.show(rows.map((row) => [row.step, row.loss, row.heldOut]));
    charts.sparsity.show(rows.filter((row) => row.expected != null).map((row) => [row.step, row.expected, row.target]));
    charts.speed.show(rows.filter((row) => row.speed != null).map((row) => [row.step, row.speed]));
    showNumbers(rows);
    showStages();
  });
}

function showNumbers(rows) {
  const last = rows.filter((row) => row.loss != null || row.speed != null).at(-1) ?? {};
  const percent = (value) => (value == null ? "–" : `${(100 * value).toFixed(1)}%`);
  setText($("n-loss"), last.loss == null ? "–" : last.loss.toFixed(4));
  setText($("n-sparsity"), percent(last.expected));
  setText($("n-target"), percent(last.target));
  setText($("n-speed"), last.speed == null ? "–" : count(last.speed));
  const [stage, all] = remaining();
  setText($("n-stage-eta"), duration(stage));
  setText($("n-eta"), duration(all));
}

/** Seconds until the running stage and the whole job end, at the present speed. */
function remaining() {
  const running = plan.find((stage) => stage.name === newest());
  const last = curves.get(running?.name)?.filter((row) => row.speed).at(-1);
  if (!last || !last.tokens || !["running", "stopping"].includes(job?.state)) return [NaN, NaN];
  const stage = ((running.steps - last.step) * last.tokens) / last.step / last.speed;
  const later = plan.slice(plan.indexOf(running) + 1).reduce((sum, next) => sum + next.tokens, 0);
  return [stage, stage + later / last.speed];
}

function showStages() {
  for (const stage of plan) {
    const step = curves.get(stage.name)?.at(-1)?.step ?? 0;
    const button = stage.item.querySelector("button");
    stage.item.querySelector("progress").value = step;
    setText(stage.item.querySelector(".steps"), step ? `${step} of ${stage.steps} steps` : `${stage.steps} steps`);
    button.setAttribute("aria-pressed", String(stage.name === current()));
    stage.item.dataset.now = String(stage.name === newest() && ["running", "starting", "stopping"].includes(job?.state));
  }
}

for (const stage of plan) {
  stage.item.querySelector("button").addEventListener("click", () => {
    chosen = stage.name === newest() ? "" : stage.name; // the newest stage is followed on to the next one
    history.replaceState(null, "", chosen ? `#${chosen}` : location.pathname);
    redraw();
  });
}

function addRecords({ stage, records }) {
  const rows = curves.get(stage) ?? [];
  for (const record of records) {
    if (!("loss" in record) && !("held_out_loss" in record)) continue;
    const row = {
      step: record.step,
      loss: record.loss,
      heldOut: record.held_out_loss,
      expected: mean(record.expected_sparsity),
      target: mean(record.target_sparsity),
      speed: record.tokens_per_second,
      tokens: record.tokens,
    };
    const last = rows.at(-1);
    if (last && last.step === row.step && row.heldOut != null) last.heldOut = row.heldOut;
    else rows.push(row);
  }
  curves.set(stage, rows);
  redraw();
}

function clear({ stage }) {
  curves.set(stage, []);
  groups.delete(stage); // a stage that starts over may have other units
  gates.delete(stage);
  redraw();
}

async function addGates({ stage, step, values }) {
  if (!groups.has(stage)) groups.set(stage, groupsOf(stage));
  const known = await groups.get(stage);
  if (!known) return groups.delete(stage);
  gates.set(stage, { step, groups: known, values: bytesOf(values) });
  if (Number($("replay").value) === Number($("replay").max)) showGates();
}

async function groupsOf(stage) {
  const answer = await fetch(`${here}/structure?stage=${stage}&points=1`).catch(() => null);
  return answer?.ok ? (await answer.json()).groups : null;
}

/** The newest gates of all stages, or those of the newest mask stage at an earlier step. */
function showGates(earlier = null) {
  const known = order.filter((stage) => gates.has(stage));
  if (!known.length) return;
  const last = known.at(-1);
  const at = earlier ?? gates.get(last);
  const stages = known.map((stage) => (stage === last ? { ...gates.get(last), values: at.values } : gates.get(stage)));
  $("structure-empty").hidden = true;
  $("structure-picture").hidden = false;
  setText($("structure-when"), `${last.replaceAll("_", " ")}, step ${at.step}`);
  structure.show(stages);
}

const past = { stage: null, records: [] };
async function replay() {
  const slider = $("replay");
  const last = order.filter((stage) => gates.has(stage)).at(-1);
  if (Number(slider.value) === Number(slider.max)) {
    past.stage = null; // read again next time, since the run continues
    slider.removeAttribute("aria-valuetext");
    return showGates();
  }
  if (past.stage !== last) {
    Object.assign(past, { stage: last, records: [] });
    const answer = await fetch(`${here}/structure?stage=${last}&points=101`).catch(() => null);
    if (!answer?.ok) return;
    past.records = (await answer.json()).records;
  }
  const count = past.records.length;
  const record = past.records[Math.round((slider.value / slider.max) * (count - 1))];
  if (!record) return;
  slider.setAttribute("aria-valuetext", `step ${record.step}`);
  showGates({ step: record.step, values: bytesOf(record.values) });
}
$("replay").addEventListener("input", replay);

function showJob(news) {
  const ended = job && job.state !== news.state;
  job = news;
  $("state").dataset.state = job.state;
  setText($("state"), job.state);
  setText($("message"), job.message);
  setText($("f-attempt"), String(job.attempt || "–"));
  showTime($("f-started"), job.started);
  showTime($("f-ended"), job.ended);
  const focused = document.activeElement;
  $("stop").hidden = !["queued", "requeued", "starting", "running"].includes(job.state);
  $("stop-now").hidden = job.state !== "stopping";
  $("resume").hidden = !["stopped", "failed", "lost"].includes(job.state);
  // The focus must not be lost with the button that was just pressed.
  if (focused?.hidden) (document.querySelector(".actions button:not([hidden])") ?? $("main")).focus();
  if (ended || job.state === "succeeded") showArtifacts();
  redraw();
}

async function showArtifacts() {
  const answer = await fetch(`${here}/artifacts`).catch(() => null);
  const files = answer?.ok ? await answer.json() : [];
  $("artifacts-empty").hidden = files.length > 0;
  $("artifacts").replaceChildren(
    ...files.map((file) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = `${here}/artifacts/${file.name.split("/").map(encodeURIComponent).join("/")}`;
      link.download = "";
      link.textContent = file.name;
      const bytes = document.createElement("span");
      bytes.textContent = size(file.bytes);
      item.append(link, " ", bytes);
      return item;
    }),
  );
}

async function act(path, body) {
  $("problem").hidden = true;
  try {
    showJob(await send(`${here}/${path}`, body));
  } catch (error) {
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  }
}
$("stop").addEventListener("click", () => act("stop"));
$("resume").addEventListener("click", () => act("resume"));
$("stop-now").addEventListener("click", () => $("confirm").showModal());
$("confirm").addEventListener("close", () => $("confirm").returnValue === "yes" && act("stop", { now: true }));

document.querySelectorAll("time").forEach((time) => showTime(time));
follow(
  `?jobs=${id}`,
  { job: showJob, metrics: addRecords, reset: clear, gates: addGates, log: (event) => output.add(event) },
  () => output.restart(),
);
