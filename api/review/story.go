package review

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/countersign-dev/countersign/api/page"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

const (
	// storyRows is how many entries of a step's story are told, from its
	// beginning; storyEnd how many from its end where there are more.
	storyRows = 500
	storyEnd  = 100
	// keyRows bounds the passkey entries of one person that are read to check
	// what they signed.
	keyRows = 1000
)

// signature says whether a decision was signed, and whether that holds.
type signature struct {
	State string // verified, broken or none
	Why   string // why it does not hold
}

// sign checks the decisions among items, by the keys that were the person's and
// active when they decided, as the offline verifier does.
func (s *Server) sign(r *http.Request, items []*item) error {
	people := map[string]bool{}
	var decisions []*item
	for _, it := range items {
		if !it.Type.IsDecision() {
			continue
		}
		it.Sign = &signature{State: "none"}
		if details[store.DecidedDetails](it.Entry).Assertion != nil {
			decisions = append(decisions, it)
			people[it.Who] = true
		}
	}
	if len(decisions) == 0 {
		return nil
	}
	for person := range people {
		var keys []*item
		for _, t := range []store.Type{store.PasskeyEnrolled, store.PasskeyActivated, store.PasskeyRevoked} {
			f, err := s.index.Find(r.Context(), ledger.Query{Person: person, Type: string(t), Limit: keyRows}, 0, s.ledger.Size())
			if err != nil {
				return err
			}
			of, err := readAll(f.Entries, true)
			if err != nil {
				return problem.Internal(err)
			}
			keys = append(keys, of...)
		}
		for _, d := range decisions {
			if d.Who == person {
				keys = append(keys, d)
			}
		}
		slices.SortFunc(keys, func(a, b *item) int { return cmp.Compare(a.Index, b.Index) })
		passkeys := store.NewPasskeys(s.origin)
		for _, k := range keys {
			switch err := passkeys.Take(k.Entry); {
			case k.Sign == nil: // an enrolment that does not hold enrols nothing
			case err == nil:
				k.Sign.State = "verified"
			default:
				k.Sign.State, k.Sign.Why = "broken", err.Error()
			}
		}
	}
	return nil
}

// chapter is one request of a step's story.
type chapter struct {
	Request      string
	Scope        string
	Target       string
	Orchestrator string
	Agent        string
	Subject      string
	Proved       bool
	HasSubject   bool
	Sensitivity  string
	Status       string
	Tone         string
	Sums         []string
	Items        []*item
	From         []*item // decisions of the request whose standing approval it draws on
	Drawn        string  // that request
}

// sum tells a chapter in a few sentences.
// partial says that it is not told whole.
func (c *chapter) sum(partial bool) {
	var issued, ended time.Time
	var approved, denied, signed, uses, late, failed, refused int
	var masked int64
	var last *item
	say := func(format string, a ...any) { c.Sums = append(c.Sums, fmt.Sprintf(format, a...)) }
	for _, it := range c.Items {
		switch it.Type {
		case store.StepRequested:
			c.Scope, c.Target, c.Orchestrator, c.Agent = it.Action, it.Resource, it.Orchestrator, it.Entry.Agent
			if it.Subject != nil {
				c.HasSubject, c.Proved = true, it.Subject.Proved
				if c.Subject = it.Opened[store.SealedSubject]; c.Subject == "" {
					c.Subject = it.Subject.ID
				}
			}
			if it.Risk != nil {
				c.Sensitivity = it.Risk.Sensitivity
			}
			c.Status, c.Tone = "allowed", "good"
			if it.Decision != nil && it.Decision.Outcome == store.NeedsApproval {
				c.Status, c.Tone = "waited for people", "accent"
			}
			if it.Decision != nil && it.Decision.Outcome == store.Deny {
				c.Status, c.Tone = "denied by policy", "danger"
				say("Policy denied it at %s; nothing was handed out.", instant(it.Time.Time))
			} else {
				say("It was asked for at %s.", instant(it.Time.Time))
			}
		case store.ApprovalDecided, store.ApprovalStanding:
			if details[store.DecidedDetails](it.Entry).Decision == store.Refuse {
				denied++
				c.Status, c.Tone = "denied by a person", "danger"
			} else {
				approved++
			}
			if it.Sign != nil && it.Sign.State == "verified" {
				signed++
			}
		case store.ApprovalExpired:
			c.Status, c.Tone = "expired", "warn"
		case store.RequestWithdrawn:
			c.Status, c.Tone = "taken back", ""
		case store.RequestVoid:
			c.Status, c.Tone = "void", "warn"
		case store.CredentialIssued:
			issued, ended = it.Time.Time, time.Time{}
			c.Status, c.Tone = "handed out", "good"
		case store.CredentialFailed:
			c.Status, c.Tone = "failed", "danger"
		case store.CredentialAbandoned:
			c.Status, c.Tone = "abandoned", "danger"
		case store.CredentialUsed:
			uses++
			last = it
			if it.Outcome != nil {
				masked += it.Outcome.Masked
				if it.Outcome.Error != "" {
					failed++
				}
			}
			if !ended.IsZero() && it.Time.After(ended) {
				late++
			}
		case store.AccessRefused:
			if d := details[store.RefusedDetails](it.Entry); d.Intent != "" {
				refused += 1 + max(d.Folded, 0)
			}
		case store.CredentialRevoked, store.CredentialExpired:
			ended = it.Time.Time
			c.Status, c.Tone = map[store.Type]string{store.CredentialRevoked: "revoked", store.CredentialExpired: "over"}[it.Type], ""
		}
	}
	if approved+denied > 0 {
		text := page.People(approved) + " approved"
		if denied > 0 {
			text += ", " + page.People(denied) + " denied"
		}
		switch signed {
		case 0:
			say("%s, without a passkey’s signature.", text)
		case approved + denied:
			say("%s, signed with a passkey. The signature was checked just now.", text)
		default:
			say("%s; %d of %d decisions are signed with a passkey, checked just now.", text, signed, approved+denied)
		}
	}
	if !issued.IsZero() {
		say("It was handed out at %s.", instant(issued))
		switch {
		case uses == 0 && !partial:
			say("No use of it is on record.")
		case partial:
			say("%s of it told here, not all.", page.Count(uses, "use"))
		default:
			say("%s on record, the last at %s.", page.Count(uses, "use"), instant(last.Time.Time))
		}
		if failed > 0 {
			say("%s failed.", page.Count(failed, "use"))
		}
		if masked > 0 {
			say("%s masked in what came back.", page.Count(int(masked), "value"))
		}
		if refused > 0 {
			say("Guards refused %s before the target was reached.", page.Count(refused, "attempt"))
		}
		if late > 0 {
			c.Tone = "danger"
			say("%s came after its end.", page.Count(late, "use"))
		}
		if ended.IsZero() {
			say("Its end is not on record yet.")
		} else {
			say("It ended at %s, %s after it was handed out.", instant(ended), page.Span(store.Duration(ended.Sub(issued).Round(time.Second))))
		}
	}
}

// storyPage is the page of one step.
type storyPage struct {
	page.Frame
	Run, Step string
	Chapters  []*chapter
	Others    []*item // entries of the step that belong to no request
	Claims    []*item // what the orchestrator says came of it
	Claim     *claim  // the latest of them against what was observed; nil: none
	Uses      string  // how many there are, where not all are told
	UsesList  string  // leads to them
	Observed  []string
	Between   int64 // index after which entries are left out; 0: none are
	List      string
	JSON, CSV string
}

// step tells one step's story, from request to last use.
func (s *Server) step(w http.ResponseWriter, r *http.Request) {
	run, step := chi.URLParam(r, "run"), chi.URLParam(r, "step")
	a, ok := s.about(w, r, func(q *ledger.Query) error {
		if !store.ValidID(run) || !store.ValidID(step) {
			return fmt.Errorf("%w: no such step", ledger.ErrNotFound)
		}
		q.Run, q.Step = run, step
		return nil
	}, func() (*claim, error) { return s.judge(r, run, step) })
	if !ok {
		return
	}
	q := a.Query
	q.Limit, q.Newest = storyRows, false
	f, err := s.index.Find(r.Context(), q, 0, s.ledger.Size())
	if err == nil && len(f.Entries) == 0 {
		err = fmt.Errorf("%w: no such step", ledger.ErrNotFound)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	p := &storyPage{Frame: s.frame(r, "Step "+step), Run: run, Step: step, List: with(&q)}
	p.JSON, p.CSV = storyURL(run, step)+"?format=json", storyURL(run, step)+"?format=csv"
	if p.Claim, err = s.judge(r, run, step); err != nil {
		s.fail(w, r, err)
		return
	}
	entries := f.Entries
	if f.Newer {
		last := entries[len(entries)-1].Index
		q.Limit, q.Newest = storyEnd, true
		tail, err := s.index.Find(r.Context(), q, last+1, s.ledger.Size())
		if err != nil {
			s.fail(w, r, err)
			return
		}
		if len(tail.Entries) > 0 {
			q.Limit, q.Newest = 1, false
			between, err := s.index.Find(r.Context(), q, last+1, tail.Entries[0].Index)
			if err != nil {
				s.fail(w, r, err)
				return
			}
			if len(between.Entries) > 0 {
				p.Between = last
				all := a.Query
				all.Limit, all.Newest = 0, false
				t, err := s.index.Counts(r.Context(), all, []time.Time{{}, s.now().Add(time.Hour)}, []ledger.Series{{Type: string(store.CredentialUsed)}})
				if err != nil {
					s.fail(w, r, err)
					return
				}
				if p.UsesList = with(&all, "type", string(store.CredentialUsed)); !t.Counting {
					p.Uses = thousands(t.Counts[0][0])
				}
			}
		}
		entries = append(entries, tail.Entries...)
	}
	items, err := readAll(entries, true)
	if err != nil {
		s.fail(w, r, problem.Internal(err))
		return
	}
	if err := s.sign(r, items); err != nil {
		s.fail(w, r, err)
		return
	}
	if err := s.chapters(r, p, items); err != nil {
		s.fail(w, r, err)
		return
	}
	page.Write(w, r, http.StatusOK, s.t, "story", p)
}

// chapters orders the entries of a step by request.
func (s *Server) chapters(r *http.Request, p *storyPage, items []*item) error {
	by := map[string]*chapter{}
	items = results(items)
	uses := 0
	for _, it := range items {
		if it.Type == store.CredentialUsed {
			uses++
		}
		if it.Type == store.StepFinished {
			p.Claims = append(p.Claims, it)
		}
		if it.Request == "" {
			if it.Type != store.StepFinished {
				p.Others = append(p.Others, it)
			}
			continue
		}
		c := by[it.Request]
		if c == nil {
			c = &chapter{Request: it.Request, Scope: it.Action, Target: it.Resource}
			by[it.Request] = c
			p.Chapters = append(p.Chapters, c)
		}
		if it.Asked != "" {
			c.Drawn = it.Asked
		}
		c.Items = append(c.Items, it)
	}
	for _, c := range p.Chapters {
		if c.Drawn != "" {
			for _, t := range []store.Type{store.ApprovalDecided, store.ApprovalStanding} {
				f, err := s.index.Find(r.Context(), ledger.Query{Request: c.Drawn, Type: string(t), Limit: pageRows}, 0, s.ledger.Size())
				if err != nil {
					return err
				}
				from, err := readAll(f.Entries, true)
				if err != nil {
					return problem.Internal(err)
				}
				c.From = append(c.From, from...)
			}
			if err := s.sign(r, c.From); err != nil {
				return err
			}
		}
		c.sum(p.Between > 0)
	}
	switch {
	case p.Between > 0:
		p.Observed = []string{"More uses were seen than this page tells: it tells " + thousands(int64(uses)) + "."}
	case uses == 0:
		p.Observed = []string{"No use of a credential of this step was seen. Where a secret was handed out directly, only a target that introspects it, or the gateway, sees its use."}
	default:
		p.Observed = []string{"Uses seen: " + thousands(int64(uses)) + "."}
	}
	return nil
}

// about reads the parameters of a page about one thing: its own filters are set
// by set. To a program it answers itself, with what judge says, and returns false.
func (s *Server) about(w http.ResponseWriter, r *http.Request, set func(*ledger.Query) error, judge ...func() (*claim, error)) (*ask, bool) {
	v := r.URL.Query()
	for name := range v {
		if !slices.Contains([]string{"format", "cursor", "before", "limit"}, name) {
			s.fail(w, r, problem.Malformed(fmt.Sprintf("there is no filter %.50q here", name)))
			return nil, false
		}
	}
	a, err := asked(v)
	if err == nil {
		err = set(&a.Query)
	}
	if err != nil {
		s.fail(w, r, err)
		return nil, false
	}
	if a.formatOf(r) != "html" {
		for _, j := range judge {
			if a.claim, err = j(); err != nil {
				s.fail(w, r, err)
				return nil, false
			}
		}
		s.answer(w, r, a)
		return nil, false
	}
	a.Limit = min(a.Limit, maxPageRows)
	return a, true
}

// aboutPage is the page of one person, or of one credential.
type aboutPage struct {
	page.Frame
	Name        string
	IsPerson    bool
	Pseudonym   string
	Counts      []quick // what there is of it, by type
	Counting    bool
	Facts       []fact
	Story       string
	Run, Step   string
	Items       []*item
	Newer, More string
	List        string
	JSON, CSV   string
	Reload      string
}

// person shows what one person decided, and did otherwise.
func (s *Server) person(w http.ResponseWriter, r *http.Request) {
	name, err := url.PathUnescape(chi.URLParam(r, "person"))
	a, ok := s.about(w, r, func(q *ledger.Query) error {
		if err != nil || len(name) > 1024 || strings.ContainsRune(name, 0) || name == "" {
			return problem.Malformed("want a person's pseudonym, or user:NAME")
		}
		q.Person = name
		return nil
	})
	if !ok {
		return
	}
	p := &aboutPage{Name: name, IsPerson: true}
	if !s.list(w, r, a, p, personURL(name)) {
		return
	}
	for _, it := range p.Items {
		p.Pseudonym = it.Who
		if it.Name != "" && p.Name == it.Who {
			p.Name = it.Name
		}
	}
	p.Frame = s.frame(r, strings.TrimPrefix(p.Name, "user:"))
	page.Write(w, r, http.StatusOK, s.t, "about", p)
}

// credential shows one credential's life and uses. It is named by its intent,
// the entry ID of credential.issuing.
func (s *Server) credential(w http.ResponseWriter, r *http.Request) {
	intent := chi.URLParam(r, "intent")
	index, err := s.index.Lookup(r.Context(), intent)
	var it *item
	if err == nil {
		var f *ledger.Found
		if f, err = s.index.Find(r.Context(), ledger.Query{Limit: 1}, index, index+1); err == nil {
			it, err = read(&f.Entries[0], true)
		}
	}
	if err == nil && it.Type != store.CredentialIssuing {
		err = fmt.Errorf("%w: %s is no intent", ledger.ErrNotFound, intent)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	a, ok := s.about(w, r, func(q *ledger.Query) error { q.Request = it.Request; return nil })
	if !ok {
		return
	}
	a.cursor = max(a.cursor, index) // before its intent there is nothing of a credential
	if a.before > 0 {
		a.cursor = index
	}
	p := &aboutPage{Name: it.Action, Run: it.Run, Step: it.Step, Story: storyURL(it.Run, it.Step), Facts: it.Facts}
	if a.before == 0 && a.Limit == 0 {
		a.Limit = maxPageRows
	}
	if !s.list(w, r, a, p, credentialURL(intent)) {
		return
	}
	p.Items = slices.DeleteFunc(results(p.Items), func(x *item) bool { return x.Intent != intent && x.Type != store.UseFinished })
	p.Frame = s.frame(r, "Credential for "+it.Action)
	page.Write(w, r, http.StatusOK, s.t, "about", p)
}

// list fills in the entries of p, a person's newest first and a credential's
// oldest first, and what leads on. It answers itself where it returns false.
func (s *Server) list(w http.ResponseWriter, r *http.Request, a *ask, p *aboutPage, at string) bool {
	a.Newest = p.IsPerson && a.cursor == 0 || a.before > 0
	f, err := s.find(r, a, pageRows)
	if err == nil && len(f.Entries) == 0 && a.cursor == 0 && a.before == 0 {
		err = fmt.Errorf("%w: nothing of %.60q", ledger.ErrNotFound, p.Name)
	}
	if err == nil {
		p.Items, err = readAll(f.Entries, true)
	}
	if err == nil {
		err = s.sign(r, p.Items)
	}
	var t *ledger.Tally
	var series []ledger.Series
	if err == nil {
		for _, k := range kinds {
			series = append(series, ledger.Series{Type: string(k.Type)})
		}
		t, err = s.index.Counts(r.Context(), a.Query, []time.Time{{}, s.now().Add(time.Hour)}, series)
	}
	if err != nil {
		if errors.Is(err, store.ErrMalformed) {
			err = problem.Internal(err)
		}
		s.fail(w, r, err)
		return false
	}
	if p.Counting = t.Counting; !t.Counting {
		for i, k := range kinds {
			if n := t.Counts[i][0]; n > 0 {
				p.Counts = append(p.Counts, quick{Name: k.Name + ": " + thousands(n), URL: with(&a.Query, "type", string(k.Type))})
			}
		}
	}
	if n := len(f.Entries); n > 0 {
		older, newer := at+"?before="+strconv.FormatInt(f.Entries[0].Index, 10), at+"?cursor="+strconv.FormatInt(f.Entries[n-1].Index+1, 10)
		if p.IsPerson && f.Older {
			p.More = older
		}
		if p.IsPerson && f.Newer {
			p.Newer = newer
		}
		if !p.IsPerson && f.Newer {
			p.More = newer
		}
	}
	if p.IsPerson {
		slices.Reverse(p.Items)
	}
	p.List, p.JSON, p.CSV, p.Reload = with(&a.Query), at+"?format=json", at+"?format=csv", r.URL.RequestURI()
	return true
}
