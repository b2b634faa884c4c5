// The form: where the anatomy comes from, what is changed, settings; the request that they make.
import { $, all, choices, element, fromTemplate, size, whole, words } from "./page.js";
import { Trouble, get, options, post } from "./server.js";
import { addEdit, apart, edits, fits, offerVerbs } from "./edits.js";
import { Upload } from "./upload.js";
import { start } from "./jobs.js";

const form = $("#form");
let uploads; // { mask, ctMask, ct }
let drawn = null; // the last mask that was asked for: its job's id, the design behind it, and whether it is done

export const kind = () => form.elements.kind.value;

function slider({ name, low_ml: low, mean_ml: mean, high_ml: high }) {
  const row = fromTemplate("organ").firstElementChild;
  const [range, ml] = [$(".slider", row), $(".ml", row)];
  $(".name", row).textContent = name;
  $(".range", row).textContent = `${words(low)} to ${words(high)} ml${mean == null ? "" : `, ${words(mean)} on average`}`;
  row.dataset.organ = name;
  Object.assign(range, { min: low, max: high, step: 10 ** Math.floor(Math.log10((high - low) / 50)) });
  Object.assign(ml, { min: low, max: high });
  range.setAttribute("aria-label", `${name}, slider`);
  ml.setAttribute("aria-label", `${name} in ml, empty for any`);
  const set = (value) => {
    ml.value = value;
    range.value = value === "" ? mean ?? (low + high) / 2 : value;
    row.classList.toggle("any", value === "");
    range.setAttribute("aria-valuetext", value === "" ? "any size" : `${value} ml`);
  };
  range.addEventListener("input", () => set(range.value));
  ml.addEventListener("input", () => {
    if (ml.value === "" || ml.checkValidity()) set(ml.value);
  });
  row.set = set;
  set("");
  return row;
}

// Refuses the first field whose value cannot be, in words.
export function valid(root) {
  const wrong = all("input, select", root).find((input) => !input.closest("[hidden]") && !input.checkValidity());
  if (!wrong) return;
  wrong.closest("details")?.setAttribute("open", "");
  const name = wrong.getAttribute("aria-label") ?? wrong.closest("label")?.textContent.trim() ?? "A field";
  const { min, max, step } = wrong;
  const allowed = min !== "" && max !== "" ? ` Allowed is ${min} to ${max}.` : min !== "" ? ` The least is ${min}.` : "";
  throw new Trouble(`${name}: “${wrong.value}” cannot be used.${allowed}${step === "1" ? " It is a whole number." : ""}`, 0, wrong);
}

// A phantom can be drawn in the fields of view of the weights that are shipped.
const drawable = () => (form.elements.weights.value === options.weights[0].name && form.elements.preset.value) || undefined;

function source() {
  switch (kind()) {
    case "phantom":
      return { kind: "phantom", body: $("#body").value, preset: drawable() };
    case "generator": {
      const asked = all(".organ").filter((row) => $(".ml", row).value !== "");
      return { kind: "generator", organ_sizes: Object.fromEntries(asked.map((row) => [row.dataset.organ, $(".ml", row).valueAsNumber])) };
    }
    case "upload":
      return { kind: "upload", ...uploads.mask.need() };
    default: {
      const { id } = uploads.ct.need();
      const mask = uploads.ctMask.need();
      return { kind: "ct", id, mask_id: mask.id, label_map: mask.label_map };
    }
  }
}

// Those of a mask are few: on which grid it is to be is the CT's business.
export function settings(makes) {
  const value = (name) => form.elements[name].value || undefined;
  const spacing = [...form.elements.spacing].map((input) => whole(input.value));
  const given = spacing.filter((mm) => mm !== undefined);
  if (given.length % 3) throw new Trouble("Give all three voxel sizes, or none.", 0, form.elements.spacing[spacing.indexOf(undefined)]);
  const limit = value("memory_limit");
  const seed = whole(form.elements.seed.value);
  if (makes === "mask") return { seed, device: value("device") };
  const kept = kind() === "ct"; // a CT that is edited keeps its grid
  return {
    weights: value("weights"),
    preset: kept ? undefined : value("preset"),
    spacing: kept || !given.length || value("preset") ? undefined : spacing,
    solver: value("solver"),
    num_inference_steps: whole(form.elements.num_inference_steps.value),
    guidance_scale: whole(form.elements.guidance_scale.value),
    seed,
    memory_limit: limit && `${limit}GiB`,
    device: value("device"),
  };
}

// All that decides how the mask looks.
const design = (seed = settings("mask").seed) => JSON.stringify([source(), edits(), seed]);

export function tell(trouble) {
  $("#problem").textContent = trouble ? trouble.message : "";
  trouble?.field?.focus();
  if (trouble && !(trouble instanceof Trouble)) console.error(trouble);
}

async function submit(makes) {
  tell();
  try {
    valid(form);
    const request = { makes, source: source(), edits: edits(), settings: settings(makes) };
    if (request.source.kind === "ct" && !request.edits.length) {
      throw new Trouble("Add a change first. Without one the CT stays as it is.", 0, $("#add-edit"));
    }
    const wanted = design();
    if (makes === "ct" && drawn?.done && drawn.design === wanted) Object.assign(request, ofMask(drawn.id));
    const job = await start(request);
    if (makes === "mask") drawn = { id: job.id, design: wanted, done: false };
  } catch (trouble) {
    tell(trouble);
  }
}

export const ofMask = (id) => ({ makes: "ct", source: { kind: "job", id }, edits: [] });

const presets = () => options.presets.filter(({ weights }) => weights === undefined || weights === form.elements.weights.value);

// The fields of view and voxels that the chosen weights know.
function offerGrids() {
  const { preset, weights } = form.elements;
  if (preset.dataset.weights !== weights.value) {
    preset.dataset.weights = weights.value;
    choices(preset, [["", "as the anatomy has it"], ...presets().map(({ name, size: n, share }) => [
      name, `${name}: ${n.join(" × ")} voxels${share == null ? "" : `, ${words(100 * share, 1)} % of the training data`}`,
    ])], preset.value);
    const ranges = options.spacing_ranges?.[weights.value];
    [...form.elements.spacing].forEach((input, axis) => {
      if (ranges) [input.min, input.max] = ranges[axis];
    });
    $("#spacing-note").textContent = `Empty: as the anatomy has it.${ranges ? ` Known are ${ranges.map((range) => range.join(" to ")).join(", ")}.` : ""}`;
  }
  const kept = kind() === "ct";
  preset.disabled = kept;
  for (const input of form.elements.spacing) input.disabled = kept || preset.value !== "";
}

// What follows from any change of the form.
let planned;
function changed() {
  for (const part of all("[data-kind]")) part.hidden = part.dataset.kind !== kind();
  offerGrids();
  $("#draw-mask").hidden = kind() === "ct"; // an edit is of CT and mask together
  $("#no-edits").hidden = Boolean($("#edit-list li"));
  $("#weights-note").textContent = options.weights.find(({ name }) => name === form.elements.weights.value)?.note ?? "";
  for (const row of all("#edit-list li")) {
    const verb = $(".verb", row);
    if (!fits(verb.value, kind())) row.remove();
    else offerVerbs(verb, kind(), verb.value);
  }
  let same = false;
  try {
    same = Boolean(drawn?.done) && design() === drawn.design;
  } catch {
    // The form is not complete yet: no mask was drawn of it.
  }
  $("#hint").textContent = same ? "The CT will be made of the mask that was drawn." : "";
  clearTimeout(planned);
  planned = setTimeout(plan, 400);
}

// How much memory this would take, in the server's words.
let plans = 0;
async function plan() {
  const mine = ++plans;
  const shown = $("#plan");
  if (!$("#settings details").open) return;
  try {
    if (kind() === "ct") throw new Trouble("an edit computes one field of view around each change, however large the CT is.");
    const { preset, memory_limit, spacing, weights, device } = settings("ct");
    const said = await post("/v1/plan", { source: source(), preset, memory_limit, spacing, weights, device });
    if (mine !== plans) return;
    const most = Math.max(...said.stages.map(({ bytes }) => bytes ?? 0), 1);
    shown.replaceChildren(
      element("p", { className: said.fits === false ? "bad" : "note", textContent: said.words }),
      element("ul", {}, ...said.stages.filter(({ bytes }) => bytes != null).map(({ name, bytes }) => {
        const meter = element("meter", { max: most, value: bytes });
        meter.setAttribute("aria-label", `Memory of the ${name}`);
        return element("li", {}, element("span", { textContent: name }), meter, element("span", { textContent: size(bytes) }));
      })),
    );
  } catch (trouble) {
    if (mine === plans) shown.replaceChildren(element("p", { className: "note", textContent: `Memory: ${trouble.message}` }));
  }
}

function fillSettings(from) {
  for (const name of ["weights", "preset", "solver", "num_inference_steps", "guidance_scale", "seed", "device"]) {
    if (from[name] != null) form.elements[name].value = from[name];
  }
  const limit = /^([\d.]+)\s*GiB$/.exec(from.memory_limit ?? "");
  if (limit) form.elements.memory_limit.value = limit[1];
  [...form.elements.spacing].forEach((input, axis) => (input.value = from.spacing?.[axis] ?? ""));
}

// Fills the form from a job, as far as it goes: after a reload it is as it was.
export async function fill(job) {
  let { source: from, edits: asked = [] } = job.request ?? {};
  let parent = null;
  if (from?.kind === "job") {
    parent = await get(`/v1/jobs/${from.id}`);
    if (parent.request?.source?.kind === "job") return;
    ({ source: from, edits: asked = [] } = parent.request ?? {});
  }
  if (!from || !options.sources.includes(from.kind)) return;
  form.elements.kind.value = from.kind;
  const { weights, ...others } = { ...parent?.request?.settings, ...job.request.settings };
  if (weights) form.elements.weights.value = weights;
  offerGrids(); // first, so that its presets can be chosen
  fillSettings(others);
  changed();
  if (from.kind === "phantom") {
    $("#body").value = from.body;
    const same = ({ size: n, spacing: mm }) => `${n} ${mm}` === `${from.size} ${from.spacing}`;
    form.elements.preset.value = from.preset ?? presets().find(same)?.name ?? form.elements.preset.value;
  }
  if (from.kind === "generator") for (const row of all(".organ")) row.set(from.organ_sizes?.[row.dataset.organ] ?? "");
  if (from.kind === "upload") await again(uploads.mask, from.id, from.label_map);
  if (from.kind === "ct") {
    await again(uploads.ct, from.id);
    await again(uploads.ctMask, from.mask_id, from.label_map);
  }
  $("#edit-list").replaceChildren();
  for (const edit of apart(asked)) addEdit(kind(), edit);
  try {
    const mask = parent ?? (job.makes === "mask" ? job : null);
    if (mask) drawn = { id: mask.id, design: design(mask.request.settings?.seed), done: mask.state === "done" };
  } catch {
    drawn = null;
  }
  changed();
}

// The form's part in a job that was heard of: once its mask is done, the CT is made of that.
export function heard(job) {
  if (job.id !== drawn?.id || drawn.done === (job.state === "done")) return;
  drawn.done = job.state === "done";
  changed();
}

// An upload of an earlier visit, which may be gone.
async function again(upload, id, labelMap) {
  let got = null;
  try {
    got = await get(`/v1/uploads/${encodeURIComponent(id)}`);
  } catch (trouble) {
    if (trouble.status !== 404) throw trouble;
  }
  await upload.use(got, labelMap);
}

export function buildForm() {
  choices($("#body"), (options.bodies ?? ["head_neck"]).map((name) => [name, name.replaceAll("_", " and ")]));
  $("#organs").replaceChildren(...options.organs.map(slider));
  $("#any-size").addEventListener("click", () => {
    for (const row of all(".organ")) row.set("");
    changed();
  });
  $("#vocabulary").replaceChildren(...options.vocabulary.map(({ name }) => element("option", { value: name })));
  for (const radio of form.elements.kind) {
    radio.disabled = !options.sources.includes(radio.value);
    radio.parentElement.hidden = radio.disabled;
  }
  const [ofMask, ofCt] = [$("[data-kind=upload]"), $("[data-kind=ct]")];
  uploads = {
    mask: new Upload($(".mask-upload", ofMask), "mask"),
    ct: new Upload($(".ct-upload", ofCt), "ct"),
    ctMask: new Upload($(".mask-upload", ofCt), "mask"),
  };
  const { elements } = form;
  choices(elements.weights, options.weights.map(({ name }) => [name]));
  choices(elements.solver, options.solvers.map((name) => [name]));
  choices(elements.device, options.devices.map((name) => [name]));
  fillSettings(options.defaults);
  if (!elements.seed.value) elements.seed.value = 0;

  form.addEventListener("input", changed);
  form.addEventListener("change", changed);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit("ct");
  });
  $("#draw-mask").addEventListener("click", () => submit("mask"));
  $("#add-edit").addEventListener("click", () => $("select", addEdit(kind())).focus());
  $("#settings details").addEventListener("toggle", plan);
  $("#another-seed").addEventListener("click", () => {
    elements.seed.value = Math.floor(Math.random() * 1e6);
    changed();
  });
  changed();
}
