// The job that is looked at, and the list of all jobs.
import { $, all, announce, element, wait, words } from "./page.js";
import { Trouble, get, post } from "./server.js";
import { showResult } from "./result.js";

const ended = (job) => ["done", "failed", "cancelled"].includes(job.state);
const moment = (value) => (value == null ? null : new Date(typeof value === "number" ? value * 1000 : value));
const SOURCES = {
  phantom: (from) => `an anatomy drawn by rule (${String(from.body).replaceAll("_", " and ")})`,
  generator: (from) => {
    const asked = Object.entries(from.organ_sizes ?? {}).map(([name, ml]) => `${name} ${words(ml, 1)} ml`);
    return `a learned anatomy${asked.length ? ` (${asked.join(", ")})` : ""}`;
  },
  upload: () => "a mask of mine",
  job: () => "the mask drawn before",
  ct: () => "a CT that is edited",
};

function title(job) {
  const from = job.request?.source;
  const count = job.request?.edits?.length ?? 0;
  const what = from?.kind === "ct" && job.makes === "ct" ? "Edited CT" : job.makes === "mask" ? "Mask" : "CT";
  const of = from && SOURCES[from.kind] && !(what === "Edited CT") ? ` of ${SOURCES[from.kind](from)}` : "";
  return `${what}${of}${count ? `, ${count} change${count > 1 ? "s" : ""}` : ""}`;
}

function duration(job) {
  const [from, to] = [moment(job.started), moment(job.finished)];
  return from && to ? ` in ${words(Math.max(0, (to - from) / 1000), 1)} s` : "";
}

// The job that is looked at: { id, job, stream, space, viewer, ... }
export let current = null;

// Called with each job as it is heard of, and whether it is the first time.
export const observers = [];

function look(id) {
  if (location.hash === `#job=${id}`) follow(id);
  else location.hash = `job=${id}`; // and hashchange does the rest
}

function leave() {
  current?.stream?.close();
  current?.space?.close();
  if (current) current.left = true;
  current = null;
}

// Shows a job until it has ended, through restarts of the server.
export async function follow(id) {
  if (current?.id === id && !current.gone) return;
  leave();
  const mine = (current = { id });
  $("#shown").replaceChildren();
  delete $("#shown").dataset.job;
  $("#state").textContent = "Asking the server.";
  $("#trouble").textContent = "";
  while (current === mine) {
    try {
      const job = await get(`/v1/jobs/${encodeURIComponent(id)}`);
      if (current !== mine) return;
      $("#trouble").textContent = "";
      show(mine, job);
      if (ended(job)) return;
      await events(mine);
      if (current !== mine || ended(mine.job)) return;
    } catch (trouble) {
      if (current !== mine) return;
      if (trouble.status === 404) {
        mine.gone = true;
        $("#state").textContent = "This result is not there any more.";
        for (const part of ["#bar", "#cancel", "#again", "#of-mask"]) $(part).hidden = true;
        return;
      }
      $("#trouble").textContent = `${trouble.message} This page asks again every few seconds.`;
      if (!(trouble instanceof Trouble)) console.error(trouble);
    }
    await wait(3000);
  }
}

// Resolves when the job has ended, or when the stream is broken: a restart, a night's sleep.
function events(mine) {
  return new Promise((resolve) => {
    const stream = (mine.stream = new EventSource(`/v1/jobs/${encodeURIComponent(mine.id)}/events`));
    const stop = () => {
      stream.close();
      resolve();
    };
    stream.addEventListener("job", (event) => {
      if (current !== mine) return stop();
      const job = JSON.parse(event.data);
      show(mine, job);
      if (ended(job)) stop();
    });
    stream.addEventListener("error", stop);
  });
}

function stateOf(job) {
  const { what, step, steps } = job.progress ?? {};
  switch (job.state) {
    case "waiting":
      return job.position > 0 ? `Waiting. ${job.position} before it.` : "Waiting for its turn.";
    case "running":
      return `${what ? what[0].toUpperCase() + what.slice(1) : "Running"}${steps ? `, step ${step} of ${steps}` : ""}.`;
    case "done":
      return `Made${duration(job)}.`;
    case "cancelled":
      return "Cancelled.";
    default:
      return "It did not work.";
  }
}

function show(mine, job) {
  const before = mine.job?.state;
  mine.job = job;
  const running = !ended(job);
  const { what, step, steps } = job.progress ?? {};
  const share = job.state === "running" && steps ? step / steps : null;
  $("#result-name").textContent = title(job);
  $("#state").textContent = stateOf(job);
  const bar = $("#bar");
  bar.hidden = !running;
  if (share == null) bar.removeAttribute("value");
  else bar.value = share;
  if (!running && document.activeElement === $("#cancel")) $("#result-name").focus();
  $("#cancel").hidden = !running;
  $("#again").hidden = false;
  $("#of-mask").hidden = !(job.state === "done" && job.makes === "mask");
  $("#trouble").textContent = job.state === "failed" ? job.error ?? "The server gave no reason." : "";
  document.title = running && share != null ? `${Math.round(100 * share)} % · MAISI studio` : "MAISI studio";
  announce(running && job.state === "running" ? `${what ?? "running"}${share == null ? "" : `, ${25 * Math.floor(4 * share)} percent`}` : stateOf(job));
  if (before !== job.state) refreshJobs();
  for (const observe of observers) observe(job, before === undefined);
  if (job.state === "done" && !mine.shown) {
    mine.shown = true;
    showResult(mine, job).catch((trouble) => {
      $("#trouble").textContent = `The result cannot be shown. ${trouble.message}`;
      if (!(trouble instanceof Trouble)) console.error(trouble);
    });
  }
}

// Of requests on their way: a second press for the same is the same press, and one for another is its own.
const starting = new Map();
export async function start(request) {
  const asked = JSON.stringify(request);
  if (!starting.has(asked)) starting.set(asked, post("/v1/jobs", request).finally(() => starting.delete(asked)));
  const job = await starting.get(asked);
  look(job.id);
  refreshJobs();
  if (matchMedia("(max-width: 900px)").matches) $("#result").scrollIntoView();
  return job;
}

let listed = "";
export async function refreshJobs() {
  let jobs;
  try {
    jobs = await get("/v1/jobs");
  } catch {
    return; // said elsewhere, and asked again soon
  }
  const text = JSON.stringify([location.hash, jobs.map(({ id, state }) => [id, state])]);
  if (text === listed) return; // keeps the focus where it is
  listed = text;
  $("#no-jobs").hidden = jobs.length > 0;
  const focused = document.activeElement?.closest?.("#jobs a")?.hash;
  $("#jobs").replaceChildren(...jobs.map((job) => {
    const link = element("a", { href: `#job=${job.id}`, textContent: title(job) });
    if (link.hash === location.hash) link.setAttribute("aria-current", "true");
    const at = moment(job.created);
    const note = [at && at.toLocaleString([], { dateStyle: "medium", timeStyle: "short" }), job.state].filter(Boolean).join(", ");
    return element("li", {}, link, " ", element("span", { className: "note", textContent: note }));
  }));
  all("#jobs a").find((link) => focused && link.hash === focused)?.focus();
}
