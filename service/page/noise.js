/** The noise panel: one picture, moved at random by as much as the slider says. */

import { Panel, card } from "./panel.js";
import { Picture, difference, drawNoise, moved, show } from "./picture.js";

export class NoisePanel {
  #panel;
  /** The model's input. */
  size = { height: 32, width: 32 };
  #slider = document.getElementById("epsilon");
  #picture = null;
  #label = "";
  #pixels = null;
  #noise = null;

  constructor(root, service) {
    this.#panel = new Panel(root, service);
    this.#slider.addEventListener("input", () => this.#draw());
    this.#slider.addEventListener("change", () => this.#ask());
    document.getElementById("again").addEventListener("click", () => {
      if (this.#pixels) this.#noise = drawNoise(this.#pixels);
      this.#ask();
    });
  }

  /** Work on a picture; `label` is what the service said of it, empty when it was not asked. */
  async take(picture, label) {
    try {
      this.#pixels = await picture.pixels(this.size.width, this.size.height);
    } catch {
      return; // no picture to this browser; the service has said so too, or knows a format more
    }
    [this.#picture, this.#label] = [picture, label];
    this.#noise = drawNoise(this.#pixels);
    this.#draw();
    this.#panel.tell("Move the slider.");
  }

  get #epsilon() {
    return Number(this.#slider.value);
  }

  #draw() {
    document.getElementById("epsilon-shown").textContent = `± ${this.#epsilon}/255`;
    this.#slider.setAttribute("aria-valuetext", `plus or minus ${this.#epsilon} of 255`);
    if (!this.#pixels) return null;
    const gain = this.#epsilon ? Math.max(1, Math.floor(120 / this.#epsilon)) : 1;
    const noisy = moved(this.#pixels, this.#noise, this.#epsilon);
    const alt = this.#picture.alt;
    show(document.getElementById("noise-before"), this.#pixels, `${alt}, at the model's size`);
    show(document.getElementById("noise-after"), noisy, `${alt}, with noise of ${this.#epsilon}/255`);
    show(document.getElementById("noise-difference"), difference(this.#pixels, noisy, gain), `The noise, enlarged ${gain} times`);
    document.getElementById("noise-gain").textContent = gain > 1 ? `difference × ${gain}` : "difference";
    return noisy;
  }

  async #ask() {
    const noisy = this.#draw();
    if (!noisy) return this.#panel.tell("Classify a picture first.");
    const before = this.#label;
    const name = `${this.#picture.name.replace(/\.\w+$/, "")}-noise-${this.#epsilon}.png`;
    const picture = await Picture.drawn(noisy, name, `${this.#picture.alt} with noise`, this.#picture.truth);
    return this.#panel.ask([picture], ([prediction]) => {
      const verdict = document.createElement("p");
      const same = prediction.label === before;
      verdict.className = `verdict ${same ? "good" : "bad"}`;
      verdict.textContent = same ? `Still ${before}` : `No longer ${before}`;
      return [...(before ? [verdict] : []), card(prediction, this.#panel.addressOf(picture), picture)];
    });
  }
}
