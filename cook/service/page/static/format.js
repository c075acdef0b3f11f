// Numbers and times as text, as the command line prints them.

export function count(value) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) < 1000) return Number.isInteger(value) ? String(value) : value.toPrecision(3);
  const units = ["", "k", "M", "G", "T"];
  let power = 0;
  while (Math.abs(value) >= 999.5 && power < units.length - 1) {
    value /= 1000;
    power += 1;
  }
  return value.toPrecision(3) + units[power];
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

export function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (bytes >= 1000 && power < units.length - 1) {
    bytes /= 1000;
    power += 1;
  }
  return `${power ? bytes.toPrecision(3) : bytes} ${units[power]}`;
}

const MOMENT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

/** Shows a <time> in the zone of the browser. */
export function showTime(element, moment) {
  if (moment !== undefined) element.setAttribute("datetime", moment ?? "");
  const date = new Date(element.getAttribute("datetime"));
  element.textContent = Number.isNaN(date.getTime()) ? "–" : MOMENT.format(date);
}

export function place(job) {
  if (job.gpus) return `${job.executor}, ${job.gpus} GPU${job.gpus > 1 ? "s" : ""}`;
  return `${job.executor}, ${job.processes} CPU process${job.processes > 1 ? "es" : ""}`;
}

/** Seconds that the newest attempt of a job has taken so far. */
export function taken(started, ended) {
  return started ? (new Date(ended || Date.now()) - new Date(started)) / 1000 : NaN;
}
