// Keeps the page fresh: one event stream says that something happened, the server renders what it looks like now.
// Everything shown works without this file. Text from outside only ever goes in as text.
"use strict";

const QUIET_MS = 10000;    // refresh at least so often: load and heat change without an event
const SPACING_MS = 1000;   // and at most so often, however much happens
const STALE_MS = 25000;    // after that, what is shown is called old
const EVENTS_MAX = 40;
const SPOKEN = new Set(["member-up", "member-down", "leader", "activated", "alarm"]);  // state changes, not ticks

const byId = (id) => document.getElementById(id);
let source = null;
let freshAt = Date.now();
let busy = false;
let timer = null;
let newest = 0;

function soon(delay) {
  if (timer !== null && delay >= timer.delay) return;
  if (timer !== null) clearTimeout(timer.id);
  timer = { delay, id: setTimeout(() => { timer = null; refresh(); }, delay) };
}

async function refresh() {
  if (document.hidden) return;  // it is asked again when it shows
  if (busy) return soon(SPACING_MS);
  busy = true;
  try {
    const answer = await fetch("/?fragment=main", { cache: "no-store", signal: AbortSignal.timeout(QUIET_MS) });
    if (!answer.ok) throw new Error(answer.statusText);
    swap(new DOMParser().parseFromString(await answer.text(), "text/html"));
    freshAt = Date.now();
  } catch { /* the age below tells */ }
  busy = false;
  age();
  soon(QUIET_MS);
}

function swap(fresh) {
  for (const part of fresh.querySelectorAll("[data-part]")) {
    const shown = document.querySelector(`main [data-part="${part.dataset.part}"]`);
    if (shown === null) return location.reload();  // the page was drawn while the node had no picture
    if (shown.className !== part.className) shown.className = part.className;
    if (shown.innerHTML === part.innerHTML) continue;
    const focused = shown.contains(document.activeElement) ? document.activeElement.id : "";
    shown.replaceChildren(...part.childNodes);
    if (focused) byId(focused)?.focus({ preventScroll: true });
  }
}

function age() {
  const old = Date.now() - freshAt;
  const stale = old > STALE_MS;
  document.body.classList.toggle("old", stale);
  byId("stale").hidden = !stale;
  byId("stale").textContent = stale ? `No answer from this node: what you see is ${Math.round(old / 1000)} s old.` : "";
  byId("live").textContent = stale ? "waiting" : source?.readyState === EventSource.OPEN ? "live" : "refreshing";
}

function localise(time) {
  const at = new Date(time.dateTime);
  if (!isNaN(at)) time.textContent = at.toLocaleTimeString([], { hourCycle: "h23" });
}

function tell(event) {
  const text = String(event.data.text ?? event.kind);
  if (SPOKEN.has(event.kind)) byId("say").textContent = text;
  if (event.kind === "ledger" || event.id <= newest) return;
  newest = event.id;
  const line = document.createElement("li");
  line.className = `k-${event.kind} new`;
  const time = document.createElement("time");
  time.dateTime = new Date(event.at * 1000).toISOString();
  localise(time);
  const words = document.createElement("span");
  words.textContent = text;
  line.append(time, " ", words);
  byId("events").prepend(line);
  while (byId("events").children.length > EVENTS_MAX) byId("events").lastElementChild.remove();
  byId("no-events").hidden = true;
}

function open() {
  if (source !== null || document.hidden) return;
  source = new EventSource("/events");
  source.onmessage = (message) => { tell(JSON.parse(message.data)); soon(SPACING_MS); };
  source.onopen = () => soon(SPACING_MS);
  source.onerror = () => {
    if (source?.readyState === EventSource.CLOSED) { source = null; setTimeout(open, QUIET_MS); }
    age();
  };
}

function close() {
  source?.close();
  source = null;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return close();
  open();
  soon(0);
});
document.querySelectorAll("#events time").forEach(localise);
setInterval(age, SPACING_MS);
open();
soon(QUIET_MS);
