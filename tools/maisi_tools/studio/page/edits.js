// The list of changes: a row for each, its verb and its controls.
import { $, all, choices, element, fromTemplate, whole, words } from "./page.js";
import { options } from "./server.js";

const LESION = () => options.lesions.map(({ name }) => [name]);
const STRUCTURE = () => options.structures.map((name) => [name]);
const number = (name, settings, value) => {
  const input = element("input", { type: "number", className: "amount", step: "any", value, ...settings });
  input.setAttribute("aria-label", name);
  return input;
};
const pick = (name, values, chosen) => {
  const select = element("select", { className: "name" });
  select.setAttribute("aria-label", name);
  const missing = chosen !== undefined && !values.some(([value]) => value === chosen);
  choices(select, missing ? [[chosen], ...values] : values, chosen); // a request may use another name for it
  return select;
};

// Each verb: its words, for which sources, its controls (filled from an edit), and the edit from them.
const VERBS = {
  insert: {
    words: "Put in a lesion",
    controls: (edit) => {
      const [[name, mm] = []] = Object.entries(edit?.insert ?? {});
      const lesion = pick("Lesion", LESION(), name);
      const hosts = element("span", { className: "note" });
      const say = () => {
        const found = options.lesions.find((one) => one.name === lesion.value)?.hosts ?? [];
        hosts.textContent = `grows in ${found.slice(0, 3).join(", ")}${found.length > 3 ? ` and ${found.length - 3} more` : ""}`;
      };
      lesion.addEventListener("change", say);
      say();
      return [lesion, number("Diameter in mm", { min: 1, max: 300 }, [mm ?? 20].flat()[0]), " mm ", hosts,
        element("label", {}, " seed ", number("Seed of this change", { min: 0, step: 1, className: "seed", placeholder: "next" }, edit?.seed ?? ""))];
    },
    edit: (row) => ({ insert: { [$(".name", row).value]: [$(".amount", row).valueAsNumber] }, seed: whole($(".seed", row).value) }),
  },
  resize: {
    words: "Change the size of",
    controls: (edit) => {
      const [[name, factor] = []] = Object.entries(edit?.resize ?? {});
      return [pick("Structure", STRUCTURE(), name ?? options.structures.find((one) => one === "left parotid gland")), " to ",
        number("Size in percent of now", { min: 10, max: 400 }, factor ? words(100 * factor, 3) : 130), " % of now"];
    },
    edit: (row) => ({ resize: { [$(".name", row).value]: $(".amount", row).valueAsNumber / 100 } }),
  },
  remove: {
    words: "Take out a lesion",
    controls: (edit) => [pick("Lesion", LESION(), edit?.remove)],
    edit: (row) => ({ remove: $(".name", row).value }),
  },
  flip: {
    words: "Swap left and right",
    not: "ct",
    controls: () => [],
    edit: () => ({ flip: true }),
  },
  redraw: {
    words: "Draw anew",
    only: "ct",
    controls: (edit) => [pick("Structure", STRUCTURE(), edit?.redraw)],
    edit: (row) => ({ redraw: $(".name", row).value }),
  },
};

export const fits = (verb, source) => (VERBS[verb].only ?? source) === source && VERBS[verb].not !== source;

// The verbs that a source allows.
export function offerVerbs(select, source, chosen) {
  const offered = Object.keys(VERBS).filter((name) => fits(name, source));
  if (all("option", select).map(({ value }) => value).join() === offered.join()) return; // an open list stays open
  choices(select, offered.map((name) => [name, VERBS[name].words]), chosen);
}

// Says to the form that a row came or went; what is typed into one bubbles up by itself.
const tellForm = () => $("#edit-list").dispatchEvent(new Event("change", { bubbles: true }));

export function addEdit(source, edit) {
  const row = fromTemplate("edit").firstElementChild;
  const verb = $(".verb", row);
  offerVerbs(verb, source, Object.keys(VERBS).find((name) => edit && name in edit) ?? "resize");
  const fill = (from) => $(".values", row).replaceChildren(...VERBS[verb.value].controls(from));
  verb.addEventListener("change", () => fill());
  $(".remove", row).addEventListener("click", () => {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    $("button", next ?? $("#edits")).focus();
    tellForm();
  });
  fill(edit);
  $("#edit-list").append(row);
  tellForm();
  return row;
}

// The name that a reader knows: a request may have a free id's own.
function known(name) {
  const id = /^placeholder (\d+)$/.exec(name)?.[1];
  return options.vocabulary.find((one) => String(one.id) === id)?.name ?? name;
}

// Edits of a request, which may do several things at once, as rows do them: one each.
export const apart = (asked) => asked.flatMap((edit) => Object.keys(VERBS).flatMap((verb) => {
  const value = edit[verb];
  if (value === undefined || value === false) return [];
  if (verb === "flip") return [{ flip: true }];
  const names = (several) => [several].flat().map(known);
  const parts = typeof value === "string" || Array.isArray(value) ? names(value) : Object.entries(value).flatMap(
    ([name, amount]) => [amount].flat().map((one) => ({ [known(name)]: one })));
  return parts.map((part) => ({ [verb]: part, seed: edit.seed }));
}));

export const edits = () => all("#edit-list li").map((row) => VERBS[$(".verb", row).value].edit(row));
