// The page that submits a recipe: the last step, and the focus on what a check has found.

import { $, send } from "/static/shell.js";

const button = $("submit");

button?.addEventListener("click", async () => {
  button.disabled = true;
  $("problem").hidden = true;
  try {
    const job = await send("/v1/jobs", JSON.parse(button.dataset.body), { "Idempotency-Key": button.dataset.key });
    location.assign(`/jobs/${job.id}`);
  } catch (error) {
    $("problem").textContent = error.message;
    $("problem").hidden = false;
    button.disabled = false;
    button.focus();
  }
});

$("check")?.addEventListener("submit", (event) => {
  // The plan of a large model takes a while.
  event.submitter.textContent = "Checking…";
});
window.addEventListener("pageshow", () => {
  const check = document.querySelector("#check button");
  if (check) check.textContent = "Check";
});
if (button) button.focus();
else $("mistakes")?.focus();
