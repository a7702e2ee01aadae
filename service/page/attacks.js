/** The attack panel: pictures that were attacked beforehand, what an undefended network says of them, and what Palisade says. */

import { Panel, fromTemplate, percent, scoreRows } from "./panel.js";
import { Picture, difference, show } from "./picture.js";

const KINDS = { clean: "As it is", transfer: "Aimed at the undefended network", "white-box": "Aimed at Palisade itself" };
const GAIN = 15; // 8/255 becomes 120 of the 127 levels on either side of grey

export class AttackPanel {
  #panel;
  #examples;
  #list = document.getElementById("versions");

  /**
   * @param {object} examples What examples.json says.
   * @param {string} version The served model's.
   */
  constructor(root, service, examples, version) {
    this.#panel = new Panel(root, service);
    this.#examples = examples;
    const choices = examples.examples.map((example) => this.#choice(example));
    root.querySelector("fieldset").append(...choices);
    document.getElementById("attack-ask").addEventListener("click", () => this.#ask());
    this.#showShares(version);
    choices[0].querySelector("input").click();
  }

  #choice(example) {
    const choice = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "example", value: example.label });
    const image = Object.assign(document.createElement("img"), { src: `page/images/${example.files.clean}`, alt: "" });
    choice.append(input, image, example.label);
    input.addEventListener("change", () => this.#choose(example));
    return choice;
  }

  async #choose(example) {
    this.example = example;
    this.#list.replaceChildren(...Object.keys(KINDS).map((kind) => this.#version(example, kind)));
    this.#panel.clear();
    const pictures = Object.keys(KINDS).map((kind) =>
      Picture.bundled(example.files[kind], `${example.label}, ${KINDS[kind].toLowerCase()}`, example.label),
    );
    this.pictures = Promise.all(pictures);
    const pixels = await Promise.all((await this.pictures).map((picture) => picture.pixels(32, 32)));
    if (this.example !== example) return;
    for (const [index, canvas] of [...this.#list.querySelectorAll("canvas")].entries()) {
      show(canvas, difference(pixels[0], pixels[index], GAIN), index ? `What the attack changed, enlarged ${GAIN} times` : "No change");
    }
  }

  #version(example, kind) {
    const item = fromTemplate("version-item");
    item.querySelector("h3").textContent = KINDS[kind];
    Object.assign(item.querySelector("img"), { src: `page/images/${example.files[kind]}`, alt: `${example.label}, ${kind}` });
    item.querySelector("figure:last-child figcaption").textContent = kind === "clean" ? "no change" : `change × ${GAIN}`;
    this.#fill(item.querySelector(".undefended"), example.undefended[kind], example.label);
    item.querySelector(".palisade").textContent = "not asked yet";
    return item;
  }

  #fill(element, said, truth) {
    const right = said.label === truth;
    element.className += right ? " good" : " bad";
    element.textContent = `${said.label} ${percent(said.confidence)}`.trim();
    const mark = document.createElement("span");
    mark.className = "mark";
    mark.textContent = right ? "right" : "wrong";
    element.append(" ", mark);
  }

  async #ask() {
    const example = this.example;
    await this.#panel.ask(await this.pictures, (predictions) => {
      for (const [index, element] of [...this.#list.querySelectorAll(".palisade")].entries()) {
        element.className = "palisade";
        this.#fill(element, predictions[index], example.label);
      }
      return [];
    });
  }

  #showShares(version) {
    const { shares, attack, undefended, palisade } = this.#examples;
    const row = (name, { percent: share, low, high }) => [name, share / 100, `${share.toFixed(1)}% (${low.toFixed(0)}–${high.toFixed(0)})`];
    const rows = scoreRows([
      row("The undefended network, attacked", shares.transfer_fools_undefended),
      row("Palisade, handed the same pictures", shares.transfer_fools_palisade),
      row("Palisade, attacked itself", shares.white_box_fools_palisade),
    ]);
    const table = document.createElement("table");
    table.className = "scores wide-names";
    table.createCaption().textContent = `How often the attack succeeds: ${shares.n} test images that both networks get right`;
    table.createTBody().append(...rows);
    const note = document.createElement("p");
    note.className = "soft small";
    note.textContent =
      `${attack.name}, epsilon ${attack.epsilon}, ${attack.steps} steps of ${attack.step_size}, ${attack.start} start; in brackets ` +
      `95% intervals. Robustness has its price: left as they are, the undefended network gets ${undefended.clean.percent}% of 1,000 ` +
      `test images right, Palisade ${palisade.clean.percent}%. ` +
      (palisade.weights_sha256.startsWith(version)
        ? ""
        : `This server runs version ${version}; the attack knew version ${palisade.weights_sha256.slice(0, 12)}, so here it is only passed on.`);
    document.getElementById("shares").replaceChildren(table, note);
  }
}
