import { $, all, choices, element, fromTemplate, size, words } from "./page.js";
import { Trouble, get, options, post, send } from "./server.js";

// A file that is sent, and for a mask how its labels are read.
export class Upload {
  constructor(root, kind) {
    Object.assign(this, { root, kind, got: null });
    root.append(fromTemplate("upload"));
    $(".what", root).textContent = kind === "ct" ? "CT" : "Mask";
    this.file = $(".file", root);
    this.file.addEventListener("change", () => this.send());
    if (kind === "mask") {
      this.fillMaps();
      $(".label-map", root).addEventListener("change", () => this.read());
      $(".labels", root).addEventListener("input", () => this.changed());
      $(".save-map", root).addEventListener("click", () => this.saveMap());
      $(".map-name", root).addEventListener("input", () => this.refuseName());
    }
  }

  fillMaps(chosen = options.label_maps[0]) {
    if (!options.label_maps.includes(chosen)) options.label_maps.push(chosen); // saved meanwhile, by another page
    choices($(".label-map", this.root), options.label_maps.map((name) => [name]), chosen);
  }

  refuse(text = "") {
    $(".refused", this.root).textContent = text;
  }

  refuseName(text = "") {
    $(".name-refused", this.root).textContent = text;
    $(".map-name", this.root).setAttribute("aria-invalid", text !== "");
  }

  async send() {
    const [file] = this.file.files;
    this.use(null);
    if (!file) return;
    const limit = options.limits.upload_bytes;
    if (file.size > limit) {
      this.refuse(`This file has ${size(file.size)}. At most ${size(limit)} can be sent.`);
      return;
    }
    const bar = $(".sent", this.root);
    bar.hidden = false;
    bar.setAttribute("aria-label", "Sent so far");
    try {
      const query = new URLSearchParams({ name: file.name, kind: this.kind });
      const got = await send(`/v1/uploads?${query}`, file, (share) => (bar.value = share));
      if (this.file.files[0] === file) await this.use(got); // else another one was chosen meanwhile
    } catch (trouble) {
      this.refuse(trouble.message);
    } finally {
      bar.hidden = true;
    }
  }

  // Takes an upload that the server has, or null for none.
  async use(got, labelMap) {
    this.got = got;
    this.asked = null; // an answer that is under way is of the file before
    this.refuse();
    const about = got && [got.name, got.size && `${got.size.join(" × ")} voxels`,
      got.spacing && `of ${got.spacing.map((mm) => words(mm, 2)).join(" × ")} mm`];
    $(".about", this.root).textContent = about ? about.filter(Boolean).join(", ") : "";
    $(".notes", this.root).replaceChildren(...(got?.notes ?? []).map((textContent) => element("li", { textContent })));
    $(".reading", this.root).hidden = !(got && this.kind === "mask");
    if (got && this.kind === "mask") {
      this.fillMaps(labelMap ?? got.label_map ?? undefined); // not the one of the mask before: its numbers are others
      $(".labels", this.root).replaceChildren();
      $(".map-name", this.root).value = "mine";
      $(".by-hand", this.root).hidden = true;
      this.refuseName();
      await this.read();
    }
    this.root.dispatchEvent(new Event("change", { bubbles: true })); // the form listens
  }

  async read() {
    const map = $(".label-map", this.root).value;
    const mine = (this.asked = {});
    $(".map-file", this.root).hidden = true;
    this.hold(true); // what is typed until the answer is there would be lost with these rows
    let labels = [];
    let refused = "";
    try {
      labels = await get(`/v1/uploads/${this.got.id}/labels?${new URLSearchParams({ label_map: map })}`);
    } catch (trouble) {
      refused = trouble.message; // and no rows: those of another reading say nothing of this one
    }
    if (mine !== this.asked) return; // another reading was chosen meanwhile
    this.refuse(refused);
    $(".labels", this.root).replaceChildren(...labels.map(({ value, voxels, meaning, known = meaning != null }) => {
      const input = element("input", { type: "text", value: meaning ?? "", placeholder: known ? "dropped" : "unknown" });
      input.setAttribute("list", "vocabulary");
      input.setAttribute("aria-label", `Structure of label ${value}`);
      Object.assign(input.dataset, { label: value, was: meaning ?? "", known });
      return element("tr", {}, element("th", { scope: "row", textContent: value }),
        element("td", { className: "number", textContent: words(voxels) }), element("td", {}, input));
    }));
    this.hold(false);
    this.changed();
  }

  hold(held) {
    for (const part of [...this.inputs(), $(".save-map", this.root)]) part.disabled = held;
  }

  inputs() {
    return all("input[data-label]", this.root);
  }

  // Says what is unknown, and offers to keep what was changed by hand.
  changed() {
    const inputs = this.inputs();
    const known = new Set(options.vocabulary.map(({ name }) => name));
    for (const input of inputs) {
      const wrong = input.value && input.value !== input.dataset.was && !known.has(input.value);
      input.setAttribute("aria-invalid", Boolean(wrong));
    }
    const unknown = inputs.filter((input) => !input.value && input.dataset.known === "false").length;
    $(".unknown", this.root).textContent = unknown
      ? `${unknown} label${unknown > 1 ? "s are" : " is"} unknown in this reading. Write the structure beside it, or leave it empty to drop it.`
      : inputs.length ? "Each structure can be changed." : "";
    const byHand = $(".by-hand", this.root);
    if (byHand.hidden && this.unsaved()) this.proposeName();
    byHand.hidden = !this.unsaved();
  }

  // A name that no reading has: "mine", or else "mine 2".
  proposeName() {
    const name = $(".map-name", this.root);
    const stem = name.value.trim().replace(/ \d+$/, "") || "mine";
    let free = name.value.trim() || stem;
    for (let count = 2; options.label_maps.includes(free); count++) free = `${stem} ${count}`;
    name.value = free;
    name.setAttribute("aria-invalid", "false");
  }

  unsaved() {
    return this.inputs().some((input) => input.value !== input.dataset.was || input.dataset.known === "false");
  }

  async saveMap() {
    const wrong = this.inputs().find((input) => input.getAttribute("aria-invalid") === "true");
    if (wrong) {
      this.refuse(`“${wrong.value}” is no structure that MAISI knows. Choose one from the list, or leave it empty.`);
      wrong.focus();
      return;
    }
    const name = $(".map-name", this.root).value.trim();
    this.refuse();
    this.refuseName();
    const labels = Object.fromEntries(this.inputs().map((input) => [input.dataset.label, input.value || null]));
    try {
      const saved = await post("/v1/label_maps", { name, labels });
      const called = saved.name ?? name;
      if (!options.label_maps.includes(called)) options.label_maps.push(called);
      this.fillMaps(called);
      await this.read();
      const link = $(".map-file", this.root);
      if (link.href) URL.revokeObjectURL(link.href);
      link.href = URL.createObjectURL(new Blob([JSON.stringify(labels, null, 2)], { type: "application/json" }));
      link.download = `${called}.json`;
      link.hidden = false;
      $(".label-map", this.root).focus();
      this.root.dispatchEvent(new Event("change", { bubbles: true }));
    } catch (trouble) {
      this.refuseName(trouble.message);
      if (trouble.status === 409) { // another reading has this name
        if (!options.label_maps.includes(name)) options.label_maps.push(name);
        this.proposeName();
      }
      $(".map-name", this.root).focus();
      $(".map-name", this.root).select();
    }
  }

  // For a request; refuses in words where there is none yet.
  need() {
    if (!this.got) throw new Trouble(this.kind === "ct" ? "Choose a CT first." : "Choose a mask first.", 0, this.file);
    if (this.kind === "mask" && this.unsaved()) {
      throw new Trouble("Say how the labels are to be read: press “Use and save it” first.", 0, $(".save-map", this.root));
    }
    return { id: this.got.id, label_map: this.kind === "mask" ? $(".label-map", this.root).value : undefined };
  }
}
