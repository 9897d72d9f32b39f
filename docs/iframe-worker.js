// The search is a worker, and browsers allow no workers on pages from the disk: there it runs in an iframe.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<script>var postMessage = data => parent.dispatchEvent(new MessageEvent("answer", { data }))<\/script>
        <script src="${url}"><\/script>`;
      this.inside = new Promise(done => (frame.onload = () => done(frame.contentWindow)));
      addEventListener("answer", ({ data }) => this.dispatchEvent(new MessageEvent("message", { data })));
      document.body.append(frame);
    }
    async postMessage(data) {
      (await this.inside).dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
