// The form: where the anatomy comes from, what is changed, settings; the request that they make.
import { $, all, choices, element, fromTemplate, size, whole, words } from "./page.js";
import { Trouble, get, options, post } from "./server.js";
import { addEdit, edits, fitEdits } from "./edits.js";
import { Upload } from "./upload.js";
import { start } from "./jobs.js";

const form = $("#form");
let uploads; // { mask, ctMask, ct }
let drawn = null; // the last mask that was asked for: its job's id, the design behind it, and whether it is done

// What the job in the form asked for and no field says: of a phantom its grid (source), settings of a mask and of a CT.
let kept = {};
let maskOf = null; // the job whose mask is taken, for the source "job"

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
      return { kind: "phantom", body: $("#body").value, ...(kept.source ?? { preset: drawable() }) };
    case "generator": {
      const asked = all(".organ").filter((row) => $(".ml", row).value !== "");
      return { kind: "generator", organ_sizes: Object.fromEntries(asked.map((row) => [row.dataset.organ, $(".ml", row).valueAsNumber])) };
    }
    case "upload":
      return { kind: "upload", ...uploads.mask.need() };
    case "job":
      return { kind: "job", id: maskOf };
    default: {
      const { id } = uploads.ct.need();
      const mask = uploads.ctMask.need();
      return { kind: "ct", id, mask_id: mask.id, label_map: mask.label_map };
    }
  }
}

const stated = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));

export const settings = (makes) => ({ ...kept[makes], ...stated(fields(makes)) });

// Those of a mask are few: on which grid it is to be is the CT's business.
function fields(makes) {
  const value = (name) => form.elements[name].value || undefined;
  const spacing = [...form.elements.spacing].map((input) => whole(input.value));
  const given = spacing.filter((mm) => mm !== undefined);
  if (given.length % 3) throw new Trouble("Give all three voxel sizes, or none.", 0, form.elements.spacing[spacing.indexOf(undefined)]);
  const limit = value("memory_limit");
  const seed = whole(form.elements.seed.value);
  if (makes === "mask") return { seed, device: value("device") };
  const edited = kind() === "ct"; // it keeps its grid
  return {
    weights: value("weights"),
    preset: edited ? undefined : value("preset"),
    spacing: edited || !given.length || value("preset") ? undefined : spacing,
    solver: value("solver"),
    num_inference_steps: whole(form.elements.num_inference_steps.value),
    guidance_scale: whole(form.elements.guidance_scale.value),
    seed,
    memory_limit: limit && `${limit}GiB`,
    device: value("device"),
  };
}

// All that decides how the mask looks.
const design = (seed = settings("mask").seed) => JSON.stringify([source(), edits(), seed, kept.mask]);

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
  const edited = kind() === "ct";
  preset.disabled = edited;
  for (const input of form.elements.spacing) input.disabled = edited || preset.value !== "";
}

// What follows from any change of the form.
let planned;
function changed() {
  for (const part of all("[data-kind]")) part.hidden = part.dataset.kind !== kind();
  offerGrids();
  $("#draw-mask").hidden = kind() === "ct"; // an edit is of CT and mask together
  $("#no-edits").hidden = Boolean($("#edit-list li"));
  $("#weights-note").textContent = options.weights.find(({ name }) => name === form.elements.weights.value)?.note ?? "";
  fitEdits(kind());
  showKept();
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

// What is kept of the job in the form, in words.
const KEPT = {
  preset: (name) => `field of view ${name}`,
  output_size: (n) => `${n.join(" × ")} voxels`,
  spacing: (mm) => `voxels of ${mm.map((one) => words(one, 3)).join(" × ")} mm`,
  memory_limit: (most) => `memory limit ${most}`,
  num_inference_steps: (steps) => `${steps} steps`,
};
const keptWords = (values = {}) => Object.entries(values).map(([name, value]) => KEPT[name]?.(value) ?? `${name.replaceAll("_", " ")} ${value}`).join(", ");

function showKept() {
  const { source: grid, mask, ct } = kept;
  $("#phantom-grid").textContent = grid ? `Drawn as in the result: ${grid.size.join(" × ")} ${KEPT.spacing(grid.spacing)}. Another field of view changes that.` : "";
  const said = [keptWords(ct), mask && keptWords(mask) ? `for a mask alone ${keptWords(mask)}` : ""].filter(Boolean).join("; ");
  $("#kept").hidden = !said;
  $("#kept-words").textContent = said && `Also asked for, as in the result: ${said}.`;
}

// Sets a field, empty where nothing is asked for; a choice that is not offered any more is added, for the server to refuse.
function put(input, value = "") {
  if (input instanceof HTMLSelectElement && ![...input.options].some((one) => one.value === String(value))) {
    input.append(element("option", { value, textContent: value }));
  }
  input.value = value;
  if (!input.checkValidity()) input.value = ""; // kept aside
}

function fillSettings(from) {
  const { elements } = form;
  const { weights, device, seed } = { ...options.defaults, ...from };
  put(elements.weights, weights);
  offerGrids(); // first, so that its presets can be chosen
  put(elements.device, device);
  put(elements.seed, seed ?? 0);
  for (const name of ["preset", "solver", "num_inference_steps", "guidance_scale"]) put(elements[name], from[name] ?? "");
  put(elements.memory_limit, /^([\d.]+)GiB$/.exec(from.memory_limit ?? "")?.[1]);
  [...elements.spacing].forEach((input, axis) => put(input, from.spacing?.[axis]));
  if ([...elements.spacing].some((input) => input.value === "")) for (const input of elements.spacing) input.value = "";
}

// Those that are asked for and that no field says.
function unsaid(asked, makes) {
  const said = stated(fields(makes));
  const left = Object.entries(asked ?? {}).filter(([name, value]) => value != null && !(name in said));
  return left.length ? Object.fromEntries(left) : undefined;
}

// A CT of a drawn mask comes back as the mask's design, where that says the same.
async function behind(job) {
  const { source: from, edits: asked, settings: set } = job.request;
  if (from.kind !== "job" || asked?.length) return null;
  const parent = await get(`/v1/jobs/${encodeURIComponent(from.id)}`);
  const { makes, source: of, settings: drawnWith } = parent.request;
  return makes === "mask" && of.kind !== "job" && parent.state === "done" && drawnWith.seed === set.seed ? parent : null;
}

// Fills the form from a job: what is not touched then asks for the same again. One job after the other, and nobody
// else meanwhile: parts of two would be a request that nobody made.
let filling = Promise.resolve();
export function fill(job) {
  const filled = filling.then(() => {
    form.inert = true;
    return fillFrom(job);
  }).finally(() => (form.inert = false));
  filling = filled.catch(() => {}); // said by the one who asked
  return filled;
}

async function fillFrom(job) {
  if (!job.request) return;
  const { makes, settings: set } = job.request;
  const parent = await behind(job);
  const { source: from, edits: asked = [] } = (parent ?? job).request;
  if (!options.sources.includes(from.kind)) return;
  $("#of-earlier").hidden = $("#of-earlier input").disabled = from.kind !== "job";
  form.elements.kind.value = from.kind;
  kept = {};
  // A mask's job says nothing of a CT, but for a phantom's field of view.
  fillSettings(makes === "ct" ? set : { ...options.defaults, seed: set.seed, device: set.device, preset: from.preset });
  changed();
  if (from.kind === "phantom") {
    put($("#body"), from.body);
    if (!from.preset || from.preset !== drawable()) kept.source = stated({ preset: from.preset, size: from.size, spacing: from.spacing });
  }
  kept.ct = makes === "ct" ? unsaid(set, "ct") : undefined;
  kept.mask = unsaid(makes === "mask" ? set : parent?.request.settings, "mask");
  if (from.kind === "generator") {
    const sizes = Object.fromEntries(Object.entries(from.organ_sizes ?? {}).map(([name, ml]) => [name.trim().toLowerCase(), ml]));
    for (const row of all(".organ")) row.set(sizes[row.dataset.organ.toLowerCase()] ?? "");
  }
  if (from.kind === "upload") await again(uploads.mask, from.id, from.label_map);
  if (from.kind === "job") {
    maskOf = from.id;
    $("#mask-of").href = `#job=${encodeURIComponent(from.id)}`;
  }
  if (from.kind === "ct") {
    await again(uploads.ct, from.id);
    await again(uploads.ctMask, from.mask_id, from.label_map);
  }
  $("#edit-list").replaceChildren();
  for (const edit of asked) addEdit(kind(), edit);
  try {
    const mask = parent ?? (makes === "mask" ? job : null);
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
  if (!got) upload.refuse("The file of this result is not there any more. Choose it once more.");
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
    radio.disabled = !options.sources.includes(radio.value) || radio.value === "job"; // see fill()
    radio.parentElement.hidden = radio.disabled;
    radio.addEventListener("input", () => (kept = {}));
  }
  const [ofMask, ofCt] = [$("[data-kind=upload]"), $("[data-kind=ct]")];
  uploads = {
    mask: new Upload($(".mask-upload", ofMask), "mask"),
    ct: new Upload($(".ct-upload", ofCt), "ct"),
    ctMask: new Upload($(".mask-upload", ofCt), "mask"),
  };
  const { elements } = form;
  choices(elements.weights, options.weights.map(({ name }) => [name]));
  choices(elements.solver, [["", "as the weights have it"], ...options.solvers.map((name) => [name])]);
  choices(elements.device, options.devices.map((name) => [name]));
  fillSettings(options.defaults);
  elements.preset.addEventListener("input", () => {
    const { preset, spacing, output_size, ...others } = kept.ct ?? {}; // what a field of view says
    kept = { mask: kept.mask, ct: others };
  });
  $("#leave-out").addEventListener("click", () => {
    kept = { source: kept.source };
    changed();
    $("#settings summary").focus();
  });

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
