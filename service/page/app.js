/** The page: puts its panels together and hands them the visitor's pictures. */

import { AttackPanel } from "./attacks.js";
import { NoisePanel } from "./noise.js";
import { Panel, card } from "./panel.js";
import { Picture } from "./picture.js";
import { QuotaView } from "./quota.js";
import { Service } from "./service.js";

const service = new Service();
const answers = new Panel(document.getElementById("answer"), service);
const quota = new QuotaView(document.getElementById("quota"));
const noise = new NoisePanel(document.querySelector(".shake"), service);

async function classify(pictures) {
  if (!pictures.length) return;
  await answers.ask(pictures, (predictions) =>
    predictions.map((prediction, index) => {
      const picture = pictures[index];
      const element = card(prediction, answers.addressOf(picture), picture, pictures.length > 1 ? 3 : 5);
      const image = element.querySelector("img");
      image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= 64));
      const button = element.querySelector("button");
      button.hidden = pictures.length === 1;
      button.addEventListener("click", () => {
        noise.take(picture, prediction.label);
        document.getElementById("epsilon").focus();
      });
      if (index === 0) noise.take(picture, prediction.label);
      return element;
    }),
  );
  document.getElementById("answer").scrollIntoView({ block: "nearest" });
}

function listen() {
  const files = document.getElementById("files");
  files.addEventListener("change", () => {
    classify([...files.files].map((file) => new Picture(file, file.name)));
    files.value = ""; // so that choosing the same file again counts as a change
  });
  const bringsFiles = (event) => event.dataTransfer?.types.includes("Files");
  const drop = document.querySelector(".drop");
  document.addEventListener("dragover", (event) => {
    if (bringsFiles(event)) event.preventDefault();
    drop.classList.toggle("over", bringsFiles(event));
  });
  document.addEventListener("dragleave", (event) => drop.classList.toggle("over", event.relatedTarget !== null && bringsFiles(event)));
  document.addEventListener("drop", (event) => {
    drop.classList.remove("over");
    if (!bringsFiles(event)) return;
    event.preventDefault();
    classify([...event.dataTransfer.files].map((file) => new Picture(file, file.name)));
  });
  document.addEventListener("paste", (event) => {
    classify([...(event.clipboardData?.files ?? [])].map((file) => new Picture(file, file.name, { alt: "pasted picture", made: true })));
  });
  document.getElementById("key").addEventListener("change", (event) => {
    service.key = event.target.value.trim();
    describe();
  });
}

/** Ask the service what it is and show it; returns undefined when it does not say. */
async function describe() {
  let model;
  try {
    model = await service.model();
  } catch (error) {
    quota.tell(error.message || "The server does not answer.");
    return undefined;
  }
  const { height, width } = model.input;
  noise.size = { height, width };
  const known = model.labels.length <= 20 ? `${model.labels.length} things: ${model.labels.join(", ")}` : `${model.labels.length} things`;
  document.getElementById("knows").textContent = `It knows ${known}.`;
  document.getElementById("version").textContent =
    `Model version ${model.version} · pictures are scaled to ${width} × ${height} pixels · tier ${model.policy.tier}`;
  return model;
}

function showSamples(samples) {
  const items = samples.map(({ label }) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const image = Object.assign(document.createElement("img"), { src: `page/images/${label}.png`, alt: "", width: 32, height: 32 });
    button.append(image, label);
    button.addEventListener("click", async () => classify([await Picture.bundled(`${label}.png`, `sample picture, ${label}`, label)]));
    item.append(button);
    return item;
  });
  document.getElementById("samples").replaceChildren(...items);
}

async function start() {
  service.onquota = (levels) => quota.show(levels);
  listen();
  const [examples, model] = await Promise.all([(await fetch("page/images/examples.json")).json(), describe()]);
  showSamples(examples.samples);
  new AttackPanel(document.getElementById("attack-panel"), service, examples, model?.version ?? "");
}

await start();
