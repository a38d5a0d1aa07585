// What the approval pages do beyond plain HTML: live updates, a ticking clock,
// and passkeys. Everything but passkeys works without it.
'use strict';

(() => {
  const skew = Date.parse(document.body.dataset.now) - Date.now(); // the server's clock is the one that counts
  const csrf = document.body.dataset.csrf;
  const say = (text) => { document.getElementById('announce').textContent = text; };

  // The clock. The server rendered the time left; here it goes on.
  function left(until) {
    let s = Math.floor((until - Date.now() - skew) / 1000);
    if (s <= 0) return 'time is over';
    const d = Math.floor(s / 86400), h = Math.floor(s / 3600) % 24, m = Math.floor(s / 60) % 60;
    s %= 60;
    if (d > 0) return `${d} d ${h} h left`;
    if (h > 0) return `${h} h ${m} min left`;
    if (m > 9) return `${m} min left`;
    if (m > 0) return `${m} min ${s} s left`;
    return `${s} s left`;
  }
  function tick() {
    for (const t of document.querySelectorAll('time[data-left]')) {
      const until = Date.parse(t.dateTime);
      const text = left(until);
      if (t.textContent !== text) t.textContent = text;
      t.classList.toggle('soon', until - Date.now() - skew < 120000);
    }
  }
  tick();
  setInterval(tick, 1000);

  // Live updates: the server says that something changed, and the regions of
  // this same page are fetched again. A region is put in only when its version
  // differs, so that what a person is typing stays.
  const regions = () => document.querySelectorAll('[data-version]');
  let waiting = 0;
  let fetching = false;
  let again = false;
  async function refresh() {
    waiting = 0;
    if (fetching) { again = true; return; }
    fetching = true;
    try {
      const r = await fetch(document.body.dataset.here, { headers: { Accept: 'text/html' }, credentials: 'same-origin', cache: 'no-store', redirect: 'manual' });
      const over = r.type === 'opaqueredirect' || r.status === 401; // to the login; what is typed stays until the person goes
      document.getElementById('over').hidden = !over;
      if (over || !r.ok) return;
      const page = new DOMParser().parseFromString(await r.text(), 'text/html');
      let changed = false;
      for (const old of regions()) {
        const now = page.getElementById(old.id);
        if (!now || now.dataset.version === old.dataset.version) continue;
        const focus = document.activeElement && old.contains(document.activeElement) ? document.activeElement.id : '';
        const typed = old.querySelector('textarea');
        const open = [...old.querySelectorAll('details[data-fold][open]')].map((d) => d.dataset.fold);
        for (const d of now.querySelectorAll('details[data-fold]')) d.open = open.includes(d.dataset.fold);
        now.classList.add('fresh');
        old.replaceWith(now);
        const field = now.querySelector('textarea');
        if (typed && field) field.value = typed.value;
        if (focus) (document.getElementById(focus) || now.querySelector('a, button, [tabindex]') || document.getElementById('main')).focus();
        changed = true;
      }
      if (changed) {
        document.title = page.title;
        tick();
        wire();
        say('This page was updated.');
      }
    } catch (e) {
      // The stream tells when the recorder is there again.
    } finally {
      fetching = false;
      if (again) { again = false; soon(); }
    }
  }
  function soon() { if (!waiting) waiting = setTimeout(refresh, 150); } // many events, one fetch
  const events = document.body.dataset.events;
  if (events && 'EventSource' in window && regions().length > 0) {
    let before = false;
    const listen = () => {
      const stream = new EventSource(events);
      stream.onopen = () => { if (before) soon(); before = true; }; // what happened while nobody listened
      for (const kind of (document.body.dataset.kinds || 'message').split(' ')) stream.addEventListener(kind, soon);
      stream.onerror = () => {
        if (stream.readyState !== EventSource.CLOSED) return; // it tries again by itself
        soon(); // the session may be over
        setTimeout(listen, 10000);
      };
      addEventListener('pagehide', () => stream.close());
    };
    listen();
    for (const e of document.querySelectorAll('[data-live]')) e.hidden = false;
    for (const e of document.querySelectorAll('[data-plain]')) e.hidden = true;
  }

  // Passkeys (W3C WebAuthn, section 5).
  const bytes = (s) => Uint8Array.from(atob(s.replace(/-/g, '+').replace(/_/g, '/')), (c) => c.charCodeAt(0));
  const text = (b) => btoa(String.fromCharCode(...new Uint8Array(b))).replace(/\+/g, '-').replace(/\//g, '_').replace(/=+$/, '');

  async function ask(url, body) {
    const r = await fetch(url, {
      method: 'POST', credentials: 'same-origin', cache: 'no-store',
      headers: { 'Content-Type': 'application/json', Accept: 'application/json', 'X-CSRF-Token': csrf },
      body: JSON.stringify(body),
    });
    let answer = null;
    try { answer = await r.json(); } catch (e) { /* said below */ }
    if (!r.ok) throw new Error((answer && (answer.detail || answer.title)) || `The recorder answered ${r.status}. Reload the page and try again.`);
    return answer;
  }
  function why(e) {
    if (e.name === 'NotAllowedError') return 'The passkey was not used: it was cancelled, took too long, or is not on this device.';
    if (e.name === 'InvalidStateError') return 'This device holds a passkey of yours for this recorder already.';
    if (e.name === 'SecurityError') return 'The browser takes no passkey at this address.';
    return e.message;
  }
  function message(form, said, bad) {
    const m = form.querySelector('.message');
    m.textContent = said;
    m.classList.toggle('bad', Boolean(bad));
  }
  function busy(form, on) {
    for (const b of form.querySelectorAll('button')) b.disabled = on || b.dataset.off === 'true';
    for (const f of form.querySelectorAll('textarea, input')) f.readOnly = on; // what is signed stays as it is
    form.setAttribute('aria-busy', on ? 'true' : 'false');
  }

  // sign has a passkey sign what the form says, and sends it. The recorder
  // chooses what is signed, and finds it again by the signature.
  async function sign(form, decision) {
    const fields = new FormData(form);
    const body = { decision, reason: (fields.get('reason') || '').trim() };
    if (decision === 'approve' && fields.get('standing')) {
      body.standing = { scopes: fields.getAll('standing_scope'), uses: Number(fields.get('standing_uses')), until: fields.get('standing_until') };
    }
    const options = (await ask(form.dataset.challenge, body)).publicKey;
    options.challenge = bytes(options.challenge);
    options.allowCredentials = options.allowCredentials.map((c) => ({ ...c, id: bytes(c.id) }));
    const c = await navigator.credentials.get({ publicKey: options });
    message(form, 'Signed. Sending…');
    body.assertion = {
      id: c.id, rawId: text(c.rawId), type: c.type,
      response: {
        authenticatorData: text(c.response.authenticatorData),
        clientDataJSON: text(c.response.clientDataJSON),
        signature: text(c.response.signature),
      },
    };
    await ask(form.action, body);
    location.assign(form.dataset.page + '?decided');
  }

  function wireDecision(form) {
    const can = Boolean(window.PublicKeyCredential && navigator.credentials);
    for (const e of form.querySelectorAll('[data-passkey]')) e.hidden = !can;
    form.addEventListener('submit', async (event) => {
      const decision = event.submitter ? event.submitter.value : '';
      const box = form.elements.sign;
      const due = form.dataset.due === 'true' && decision === 'approve';
      if (!due && !(box && box.checked)) return; // a plain form
      event.preventDefault();
      if (!can) { message(form, 'This browser has no passkeys here. Approve in one that has.', true); return; }
      busy(form, true);
      message(form, 'Confirm with your passkey…');
      try {
        await sign(form, decision);
      } catch (e) {
        busy(form, false);
        message(form, why(e), true);
      }
    });
  }

  function wireEnrolment(form) {
    if (!window.PublicKeyCredential || !navigator.credentials) {
      message(form, 'This browser has no passkeys at this address.', true);
      return;
    }
    form.querySelector('button').disabled = false;
    form.addEventListener('submit', async (event) => {
      event.preventDefault();
      const fields = new FormData(form);
      busy(form, true);
      message(form, 'Follow what your device asks…');
      try {
        const options = (await ask(form.dataset.options, { label: fields.get('label') || '' })).publicKey;
        options.challenge = bytes(options.challenge);
        options.user.id = bytes(options.user.id);
        options.excludeCredentials = (options.excludeCredentials || []).map((c) => ({ ...c, id: bytes(c.id) }));
        const c = await navigator.credentials.create({ publicKey: options });
        message(form, 'Made. Now your provider confirms that it is you…');
        const next = await ask(form.action, {
          label: fields.get('label') || '',
          credential: {
            id: c.id, rawId: text(c.rawId), type: c.type,
            response: {
              attestationObject: text(c.response.attestationObject),
              clientDataJSON: text(c.response.clientDataJSON),
              transports: c.response.getTransports ? c.response.getTransports() : [],
            },
          },
        });
        location.assign(next.location);
      } catch (e) {
        busy(form, false);
        message(form, why(e), true);
      }
    });
  }

  // Forms that a refresh put in anew are wired like the first ones.
  const wired = new WeakSet();
  function wire() {
    for (const form of document.querySelectorAll('form[data-challenge], form[data-options]')) {
      if (wired.has(form)) continue;
      wired.add(form);
      if (form.dataset.challenge) wireDecision(form); else wireEnrolment(form);
    }
  }
  wire();
})();
