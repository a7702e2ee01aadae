/** The quota: one meter for each window of time. */

const TICK_MS = 1000;

export class QuotaView {
  #root;
  #levels = [];

  constructor(root) {
    this.#root = root;
    setInterval(() => this.#draw(), TICK_MS);
  }

  /** @param {{window: string, limit: number, remaining: number, resetAt: number}[]} levels As `Service.onquota` gives them. */
  show(levels) {
    this.#levels = levels;
    this.#root.replaceChildren(...levels.map(() => document.getElementById("level").content.cloneNode(true)));
    if (!levels.length) this.tell("There is no limit on this server.");
    this.#draw();
  }

  /** Show a message instead. */
  tell(text) {
    const message = document.createElement("p");
    message.className = "soft";
    message.textContent = text;
    this.#root.replaceChildren(message);
  }

  #draw() {
    for (const [index, element] of [...this.#root.querySelectorAll(".level")].entries()) {
      const level = this.#levels[index];
      const wait = Math.ceil((level.resetAt - Date.now()) / 1000);
      const left = wait > 0 ? level.remaining : level.limit;
      const isForEver = level.resetAt === Infinity;
      const ofWindow = isForEver ? "in all" : `per ${level.window}`;
      const meter = element.querySelector("[role=meter]");
      element.querySelector(".count").textContent = `${left} of ${level.limit} ${ofWindow}`;
      element.querySelector(".anew").textContent = left < level.limit && !isForEver ? `all again in ${span(wait)}` : "";
      meter.setAttribute("aria-label", `Images left of ${level.limit} ${ofWindow}`);
      meter.setAttribute("aria-valuemax", level.limit);
      meter.setAttribute("aria-valuenow", left);
      meter.classList.toggle("low", left <= level.limit / 10);
      meter.firstElementChild.style.setProperty("inline-size", `${(100 * left) / level.limit}%`);
    }
  }
}

function span(seconds) {
  if (seconds < 100) return `${seconds} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}
