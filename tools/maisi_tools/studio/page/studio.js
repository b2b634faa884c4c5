// The studio's page begins here: the form (form.js) makes jobs, jobs.js follows them, result.js shows what they made.
import { $, wait } from "./page.js";
import { AWAY, ask, get, options } from "./server.js";
import { buildForm, fill, heard, kind, ofMask, settings, tell, valid } from "./form.js";
import { current, follow, observers, refreshJobs, start } from "./jobs.js";

$("#cancel").addEventListener("click", async () => {
  try {
    await ask(`/v1/jobs/${encodeURIComponent(current.id)}`, { method: "DELETE" });
    refreshJobs();
  } catch (trouble) {
    $("#trouble").textContent = trouble.message;
  }
});

$("#again").addEventListener("click", async () => {
  try {
    await fill(current.job);
    $(`[name=kind][value=${kind()}]`).focus();
  } catch (trouble) {
    $("#trouble").textContent = trouble.message;
  }
});

$("#of-mask").addEventListener("click", async () => {
  try {
    valid($("#settings"));
    await start({ ...ofMask(current.id), settings: settings("ct") });
  } catch (trouble) {
    $("#trouble").textContent = trouble.message;
    trouble.field?.focus();
  }
});

const asked = () => /^#job=(.+)$/.exec(location.hash)?.[1];

function fromAddress() {
  if (asked()) follow(decodeURIComponent(asked()));
  refreshJobs();
}

async function health() {
  const shown = $("#server");
  while (true) {
    let pause = 2000;
    try {
      await ask("/v1/health/ready");
      shown.textContent = "Ready.";
      shown.classList.remove("bad");
      pause = 20000;
    } catch (trouble) {
      const starting = trouble.status === 503;
      shown.textContent = starting ? "The networks are being loaded. Jobs may be sent already." : AWAY;
      shown.classList.toggle("bad", !starting);
    }
    await wait(pause);
    await refreshJobs();
  }
}

async function begin() {
  health();
  while (!options.sources) {
    try {
      Object.assign(options, await get("/v1/options"));
    } catch (trouble) {
      tell(trouble);
      await wait(3000);
    }
  }
  tell();
  buildForm();
  document.body.dataset.ready = "true";
  observers.push(heard);
  // A page that is loaded again has the form of the job that it shows.
  let restored = asked();
  observers.push((job, first) => {
    if (first && job.id === restored) fill(job).catch((trouble) => console.warn(trouble));
    restored = null;
  });
  window.addEventListener("hashchange", fromAddress);
  document.addEventListener("visibilitychange", () => document.hidden || refreshJobs());
  fromAddress();
}

begin();
