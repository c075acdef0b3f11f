// What all pages share: requests, the event stream, and the log-out button.

export async function send(path, body = {}, headers = {}) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify(body),
  });
  if (response.ok) return response.status === 204 ? null : response.json();
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error || message;
  } catch { /* a proxy's page */ }
  throw new Error(message);
}

export function $(id) {
  return document.getElementById(id);
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text; // the same text again would be read out again
}

/**
 * Follows the events of the service. A browser reconnects by itself after a lost connection, from the last event on. It
 * gives up when a proxy or the server answers with an error: then a new stream starts from the beginning.
 */
export function follow(query, handlers, onNewStream = () => {}) {
  let source = null;
  let timer = 0;

  function open() {
    $("live").hidden = false;
    onNewStream();
    source = new EventSource(`/v1/events${query}`);
    source.onopen = () => show("live", "live");
    source.onerror = () => {
      show("lost", "reconnecting");
      if (source.readyState === EventSource.CLOSED) {
        clearTimeout(timer);
        timer = setTimeout(retry, 3000);
      }
    };
    for (const [name, handler] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => handler(JSON.parse(event.data)));
    }
  }

  async function retry() {
    const answer = await fetch("/v1/jobs?limit=1").catch(() => null);
    if (answer && answer.status === 401) location.assign("/login");
    else open();
  }

  // A page in the browser's cache of earlier pages keeps no connection; a connection would prevent this cache.
  window.addEventListener("pagehide", () => source.close());
  window.addEventListener("pageshow", (event) => event.persisted && open());
  open();
}

function show(state, text) {
  const live = $("live");
  live.dataset.live = state;
  setText(live, text);
}

$("logout")?.addEventListener("click", async () => {
  await send("/v1/logout").catch(() => {});
  location.assign("/login");
});
