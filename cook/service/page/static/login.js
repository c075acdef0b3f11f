import { $, send } from "/static/shell.js";

$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const problem = $("problem");
  problem.hidden = true;
  try {
    await send("/v1/login", { token: $("token").value.trim() });
    location.assign("/");
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
    $("token").select();
  }
});
