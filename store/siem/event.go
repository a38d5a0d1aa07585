// Package siem hands the record to other people's security monitoring: as
// events of the Open Cybersecurity Schema Framework (https://schema.ocsf.io),
// one JSON line each, and pushed there as they happen, by HTTP or syslog.
//
// An event is a view of an entry for searching and alerting, no proof: what is
// proved is the leaf, which each event names by log, index and leaf hash.
package siem

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
)

// SchemaVersion is the OCSF version that events follow.
const SchemaVersion = "1.5.0"

// Product says what stands in every event about where it comes from.
type Product struct {
	Version string // of this program
	Log     string // the log's origin, as in its checkpoints

	// IncludeTexts hands out the texts behind commitments: reasons, subjects,
	// summaries, names. They are erasable here, and no erasure reaches what a
	// SIEM was given, so that it is off by default. Catalogues, policies, ID tokens
	// and what uses asked and got are left out all the same.
	IncludeTexts bool
	// MaxBytes is the longest event. A longer one goes without details, texts and
	// the policy's reasons, and says so in unmapped.cut; the leaf has them. 0: no
	// limit.
	MaxBytes int
}

// texts are the sealed fields that IncludeTexts hands out.
var texts = []string{store.SealedReason, store.SealedSubject, store.SealedSummary, store.SealedPerson, store.SealedLabel}

// The classes of events that are used here, by class_uid.
const (
	classBase       = 0    // Base Event
	classDetection  = 2004 // Detection Finding
	classAccount    = 3001 // Account Change
	classLogin      = 3002 // Authentication
	classAuthorize  = 3003 // Authorize Session
	classEntity     = 3004 // Entity Management
	classUserAccess = 3005 // User Access Management
	classHTTP       = 4002 // HTTP Activity
	classAPI        = 6003 // API Activity
	classDatastore  = 6005 // Datastore Activity
)

// activity_id of what several classes share; other numbers stand in the table.
const (
	created = 1
	read    = 2
	updated = 3
	deleted = 4
	other   = 99
)

// severity_id.
const (
	informational = 1
	low           = 2
	medium        = 3
	high          = 4
)

// status_id.
const (
	unknown = 0
	success = 1
	failure = 2
)

// mapping is how a type of entry stands in OCSF.
type mapping struct {
	class, activity int
	name            string // activity_name, as the schema has it, or our own of Other
	severity        int
	status          int
	entity          string // entity.type, of Entity Management
	says            string // message
}

// mappings is the table in docs/operations.md. What an entry's content changes
// about it stands in refine.
var mappings = map[store.Type]mapping{
	store.StepRequested:       {classAPI, created, "Create", informational, success, "", "A step asked for a credential"},
	store.StepFinished:        {classAPI, updated, "Update", informational, success, "", "A step finished"},
	store.RequestWithdrawn:    {classAPI, deleted, "Delete", informational, success, "", "A request was withdrawn"},
	store.RequestVoid:         {classAPI, deleted, "Delete", low, failure, "", "A request became void"},
	store.ApprovalRequested:   {classEntity, created, "Create", informational, success, "approval", "People were asked for an approval"},
	store.ApprovalDecided:     {classEntity, updated, "Update", informational, success, "approval", "A person decided on an approval"},
	store.ApprovalStanding:    {classEntity, updated, "Update", low, success, "approval", "A person approved for a whole run"},
	store.ApprovalExpired:     {classEntity, deleted, "Delete", informational, success, "approval", "An approval expired"},
	store.CredentialIssuing:   {classEntity, created, "Create", informational, unknown, "credential", "A credential is about to be issued"},
	store.CredentialIssued:    {classAuthorize, 1, "Assign Privileges", informational, success, "", "A credential was issued"},
	store.CredentialFailed:    {classAuthorize, 1, "Assign Privileges", low, failure, "", "A credential could not be issued"},
	store.CredentialAbandoned: {classEntity, deleted, "Delete", low, success, "credential", "The issuing of a credential was given up"},
	store.CredentialUsed:      {classAPI, other, "Use", informational, success, "", "A credential was used"},
	store.UseFinished:         {classAPI, other, "Use", informational, success, "", "Results of uses were recorded"},
	store.CredentialRevoked:   {classUserAccess, 2, "Revoke Privileges", informational, success, "", "A credential was revoked"},
	store.CredentialExpired:   {classUserAccess, 2, "Revoke Privileges", informational, success, "", "A credential expired"},
	store.AccessRefused:       {classAPI, other, "Refuse", medium, failure, "", "A call was refused"},
	store.AlertRaised:         {classDetection, created, "Create", high, unknown, "", "An alert was raised"},
	store.FreezeSet:           {classEntity, created, "Create", high, success, "freeze", "Credentials were stopped"},
	store.FreezeLifted:        {classEntity, deleted, "Delete", medium, success, "freeze", "A stop was lifted"},
	store.PasskeyEnrolled:     {classEntity, created, "Create", low, success, "passkey", "A passkey was enrolled"},
	store.PasskeyActivated:    {classAccount, 10, "MFA Factor Enable", low, success, "", "A passkey was activated"},
	store.PasskeyRevoked:      {classAccount, 11, "MFA Factor Disable", low, success, "", "A passkey was revoked"},
	store.SlackLinked:         {classEntity, created, "Create", low, success, "slack-link", "A Slack account was linked to a person"},
	store.PolicyLoaded:        {classEntity, updated, "Update", low, success, "policy", "Catalogue and policy were loaded"},
	store.WriterAdded:         {classEntity, created, "Create", medium, success, "writer", "A writer was added to the log"},
	store.ExportCreated:       {classAPI, read, "Read", low, success, "", "A part of the record was exported"},
	store.DetailsErased:       {classEntity, deleted, "Delete", low, success, "details", "Texts were erased"},
	store.HoldPlaced:          {classEntity, created, "Create", low, success, "hold", "A legal hold was placed"},
	store.HoldLifted:          {classEntity, deleted, "Delete", low, success, "hold", "A legal hold was lifted"},
}

// event is one OCSF event. Members that a class does not have are left out.
type event struct {
	Activity     int            `json:"activity_id"`
	ActivityName string         `json:"activity_name"`
	Category     int            `json:"category_uid"`
	Class        int            `json:"class_uid"`
	Type         int            `json:"type_uid"`
	Severity     int            `json:"severity_id"`
	Status       int            `json:"status_id"`
	StatusDetail string         `json:"status_detail,omitzero"`
	Time         int64          `json:"time"` // Unix milliseconds, as every timestamp_t
	Message      string         `json:"message"`
	Metadata     metadata       `json:"metadata"`
	Actor        *actor         `json:"actor,omitzero"`
	User         *user          `json:"user,omitzero"`
	Session      *session       `json:"session,omitzero"`
	Privileges   []string       `json:"privileges,omitzero"`
	API          *api           `json:"api,omitzero"`
	Request      *httpRequest   `json:"http_request,omitzero"`
	Source       *endpoint      `json:"src_endpoint,omitzero"`
	Destination  *endpoint      `json:"dst_endpoint,omitzero"`
	Database     *database      `json:"database,omitzero"`
	Service      *named         `json:"service,omitzero"`
	Entity       *entity        `json:"entity,omitzero"`
	Finding      *finding       `json:"finding_info,omitzero"`
	Alert        bool           `json:"is_alert,omitzero"`
	Resources    []resource     `json:"resources,omitzero"`
	Unmapped     map[string]any `json:"unmapped"`
}

type metadata struct {
	Version     string  `json:"version"`
	Product     product `json:"product"`
	UID         string  `json:"uid"`        // the entry's ID: the same again when an event is sent again
	Code        string  `json:"event_code"` // the entry's type
	LogName     string  `json:"log_name"`   // the log's origin
	LogProvider string  `json:"log_provider"`
	Sequence    int64   `json:"sequence"` // the entry's index
	Correlation string  `json:"correlation_uid,omitzero"`
	Original    string  `json:"original_time"`
}

type product struct {
	Name    string `json:"name"`
	Vendor  string `json:"vendor_name"`
	Version string `json:"version,omitzero"`
}

type actor struct {
	User *user  `json:"user,omitzero"`
	App  string `json:"app_uid,omitzero"`
}

type user struct {
	UID    string  `json:"uid"`
	Type   int     `json:"type_id"` // 1 User, 4 Service
	Groups []named `json:"groups,omitzero"`
}

type named struct {
	Name string `json:"name"`
}

type session struct {
	UID        string `json:"uid"`
	Credential string `json:"credential_uid,omitzero"`
	Expires    int64  `json:"expiration_time,omitzero"`
}

type api struct {
	Operation string `json:"operation"`
	Service   named  `json:"service"`
	Request   *uid   `json:"request,omitzero"`
}

type uid struct {
	UID string `json:"uid"`
}

type httpRequest struct {
	Method string `json:"http_method,omitzero"`
	URL    struct {
		Path string `json:"path,omitzero"`
	} `json:"url"`
}

type endpoint struct {
	IP      string `json:"ip,omitzero"`
	Service string `json:"svc_name,omitzero"`
}

type database struct {
	Name string `json:"name"`
	Type int    `json:"type_id"` // 1 Relational
}

type entity struct {
	Type    string `json:"type"`
	UID     string `json:"uid"`
	Name    string `json:"name,omitzero"`
	Version string `json:"version,omitzero"`
}

type finding struct {
	UID     string   `json:"uid"`
	Title   string   `json:"title"`
	Says    string   `json:"desc,omitzero"`
	Types   []string `json:"types,omitzero"`
	Created int64    `json:"created_time"`
}

type resource struct {
	Name        string `json:"name"`
	Criticality string `json:"criticality,omitzero"`
}

// Event is the OCSF event of entry e, whose stored bytes are leaf and which
// stands at index: one JSON document without a line break. opened has the texts
// behind its commitments that are not erased; they are used only where
// o.IncludeTexts is set. A type that is not known here becomes a Base Event.
// Details that are not as their type has them are handed on as they are, so
// that no entry is left out; the error is of what cannot be written as JSON.
func Event(index int64, leaf []byte, e *store.Entry, opened map[string]string, o Product) ([]byte, error) {
	b, _, err := render(index, leaf, e, opened, o)
	return b, err
}

// render is Event, with its severity_id.
func render(index int64, leaf []byte, e *store.Entry, opened map[string]string, o Product) ([]byte, int, error) {
	m, ok := mappings[e.Type]
	if !ok {
		m = mapping{classBase, other, string(e.Type), informational, unknown, "", "An entry of type " + string(e.Type)}
	}
	ev := &event{
		Activity: m.activity, ActivityName: m.name, Severity: m.severity, Status: m.status, Message: m.says,
		Time: e.Time.UnixMilli(),
		Metadata: metadata{
			Version: SchemaVersion, Product: product{"Countersign", "Countersign", o.Version},
			UID: e.ID, Code: string(e.Type), LogName: o.Log, LogProvider: "countersign", Sequence: index,
			Correlation: e.Request, Original: e.WriterTime.String(),
		},
		Actor: actorOf(e),
	}
	if e.Resource != "" {
		ev.Resources = []resource{{Name: e.Resource}}
		if e.Risk != nil {
			ev.Resources[0].Criticality = e.Risk.Sensitivity
		}
	}
	ev.Unmapped = rest(index, leaf, e)
	refine(ev, &m, e)
	ev.Class, ev.Category, ev.Type = m.class, m.class/1000, m.class*100+ev.Activity
	require(ev, &m, e)
	if len(e.Details) > 0 {
		ev.Unmapped["details"] = e.Details
	}
	if o.IncludeTexts {
		shown := map[string]string{}
		for _, f := range texts {
			if t, ok := opened[f]; ok && e.Sealed[f] != "" {
				shown[f] = t
			}
		}
		if len(shown) > 0 {
			ev.Unmapped["texts"] = shown
		}
	}
	b, err := ev.marshal()
	if err == nil && o.MaxBytes > 0 && len(b) > o.MaxBytes {
		for _, name := range []string{"details", "texts", "decision", "subject", "cause"} {
			delete(ev.Unmapped, name)
		}
		ev.Unmapped["cut"] = true
		b, err = ev.marshal()
	}
	if err != nil {
		return nil, 0, fmt.Errorf("entry %d as OCSF: %w", index, err)
	}
	return b, ev.Severity, nil
}

func (ev *event) marshal() ([]byte, error) {
	return json.Marshal(ev, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
}

// rest are the entry's members that OCSF has no place for, and what leads back
// to the leaf.
func rest(index int64, leaf []byte, e *store.Entry) map[string]any {
	u := map[string]any{"index": index, "leaf_hash": store.HashText(store.LeafHash(leaf)), "writer": e.Writer, "agent": e.Agent}
	for name, v := range map[string]string{"orchestrator": e.Orchestrator, "run": e.Run, "step": e.Step, "action": e.Action} {
		if v != "" {
			u[name] = v
		}
	}
	if e.Subject != nil {
		u["subject"] = *e.Subject
	}
	if e.Decision != nil {
		u["decision"] = *e.Decision
	}
	if e.Risk != nil {
		u["risk"] = *e.Risk
	}
	if e.Cause != nil {
		u["cause"] = *e.Cause
	}
	return u
}

// actorOf is who acted: the person, by pseudonym, or else the workload.
func actorOf(e *store.Entry) *actor {
	a := &actor{User: &user{UID: e.Agent, Type: 4}, App: e.Orchestrator}
	if e.Person != nil {
		a.User = &user{UID: *e.Person, Type: 1}
	}
	return a
}

// refine takes from the entry's content what changes its event.
func refine(ev *event, m *mapping, e *store.Entry) {
	if e.Cause != nil {
		ev.StatusDetail = *e.Cause
	}
	switch e.Type {
	case store.StepRequested:
		if e.Decision != nil {
			ev.StatusDetail = string(e.Decision.Outcome)
			if e.Decision.Outcome == store.Deny {
				ev.Status, ev.Severity = failure, medium
			}
		}
	case store.StepFinished:
		if d, err := store.DetailsAs[store.FinishedDetails](e); err == nil {
			switch ev.StatusDetail = d.Outcome; d.Outcome {
			case "succeeded":
			case "failed":
				ev.Status, ev.Severity = failure, low
			default:
				ev.Status = other
			}
		}
	case store.ApprovalRequested:
		if d, err := store.DetailsAs[store.ApprovalRequestedDetails](e); err == nil {
			ev.Entity = &entity{UID: d.Approval}
		}
	case store.ApprovalDecided, store.ApprovalStanding:
		if d, err := store.DetailsAs[store.DecidedDetails](e); err == nil {
			ev.Entity, ev.StatusDetail = &entity{UID: d.Approval}, d.Decision
			for _, g := range d.Groups {
				ev.Actor.User.Groups = append(ev.Actor.User.Groups, named{g})
			}
			if d.Decision == store.Refuse {
				ev.Severity = low
			}
		}
	case store.ApprovalExpired:
		if d, err := store.DetailsAs[store.ExpiredDetails](e); err == nil {
			ev.Entity = &entity{UID: d.Approval}
		}
	case store.CredentialIssuing:
		ev.Entity = &entity{UID: e.ID}
	case store.FreezeSet:
		if d, err := store.DetailsAs[store.FreezeDetails](e); err == nil {
			ev.Entity = &entity{UID: e.ID, Name: d.String()}
		}
	case store.FreezeLifted:
		if d, err := store.DetailsAs[store.FreezeLiftedDetails](e); err == nil {
			ev.Entity = &entity{UID: d.Freeze}
		}
	case store.CredentialIssued:
		if d, err := store.DetailsAs[store.IssuedDetails](e); err == nil {
			ev.Session = &session{UID: d.Intent, Credential: d.Accessor}
			if ev.Session.Credential == "" {
				ev.Session.Credential = d.Serial
			}
			if !d.Expires.IsZero() {
				ev.Session.Expires = d.Expires.UnixMilli()
			}
			ev.StatusDetail = d.Kind
		}
	case store.CredentialFailed:
		if d, err := store.DetailsAs[store.FailedDetails](e); err == nil {
			ev.Session, ev.StatusDetail = &session{UID: d.Intent}, d.Problem
		}
	case store.CredentialAbandoned:
		if d, err := store.DetailsAs[store.ClosedDetails](e); err == nil {
			ev.Entity = &entity{UID: d.Intent}
		}
	case store.UseFinished:
		d, err := store.DetailsAs[store.UseFinishedDetails](e)
		if err != nil {
			return
		}
		for i := range d.Outcomes {
			if d.Outcomes[i].Error != "" {
				ev.Status, ev.Severity, ev.StatusDetail = failure, low, d.Outcomes[i].Error
				break
			}
		}
	case store.AccessRefused:
		d, err := store.DetailsAs[store.RefusedDetails](e)
		if err != nil {
			return
		}
		ev.StatusDetail = d.Problem
		if d.Remote != "" {
			ev.Source = &endpoint{IP: d.Remote}
		}
		if d.Intent != "" {
			guarded(ev, m, e, &d)
			return
		}
		if d.Problem == "unauthenticated" {
			// Nobody knows who it was: a failed login.
			m.class, ev.Activity, ev.ActivityName, ev.Severity = classLogin, 1, "Logon", low
		}
		if d.Method != "" || d.Route != "" {
			ev.Request = &httpRequest{Method: d.Method}
			ev.Request.URL.Path = d.Route
		}
	case store.PasskeyEnrolled:
		if d, err := store.DetailsAs[store.EnrolledDetails](e); err == nil {
			ev.Entity = &entity{UID: e.ID, Name: d.Credential}
		}
	case store.PasskeyActivated:
		if d, err := store.DetailsAs[store.ActivatedDetails](e); err == nil && d.By != "" {
			ev.Actor = &actor{User: &user{UID: d.By, Type: 1}}
		}
	case store.PasskeyRevoked:
		if d, err := store.DetailsAs[store.PasskeyRevokedDetails](e); err == nil && d.By != "" {
			ev.Actor = &actor{User: &user{UID: d.By, Type: 1}}
		}
	case store.PolicyLoaded:
		if d, err := store.DetailsAs[store.PolicyDetails](e); err == nil {
			ev.Entity = &entity{UID: d.Digest, Version: d.Digest}
		}
	case store.WriterAdded:
		if d, err := store.DetailsAs[store.WriterDetails](e); err == nil {
			ev.Entity = &entity{UID: d.Name, Name: d.Name}
		}
	case store.HoldLifted:
		if d, err := store.DetailsAs[store.HoldLiftedDetails](e); err == nil {
			ev.Entity = &entity{UID: d.Hold}
		}
	}
}

// guarded is a refusal by a guard on the access path: an activity of the class of
// its protocol that did not come to pass.
func guarded(ev *event, m *mapping, e *store.Entry, d *store.RefusedDetails) {
	m.says = "A guard refused what a step asked of its target"
	ev.Message = m.says
	if d.Reason != "" {
		ev.StatusDetail = d.Reason
	}
	verb, rest, _ := strings.Cut(d.Route, " ")
	switch d.Method {
	case store.ProtocolHTTP:
		m.class = classHTTP
		ev.Request = &httpRequest{Method: verb}
		ev.Request.URL.Path = rest
		ev.Activity, ev.ActivityName = other, verb
		for id, name := range []string{"", "Connect", "Delete", "Get", "Head", "Options", "Post", "Put", "Trace"} {
			if strings.EqualFold(name, verb) && name != "" {
				ev.Activity, ev.ActivityName = id, name
			}
		}
	case store.ProtocolPostgres:
		m.class = classDatastore
		ev.Activity, ev.ActivityName = other, verb
		for name, as := range map[string]struct {
			id   int
			name string
		}{"SELECT": {1, "Read"}, "UPDATE": {2, "Update"}, "INSERT": {5, "Write"}, "COPY": {4, "Query"}, "CREATE": {6, "Create"}, "DELETE": {7, "Delete"}, "DROP": {7, "Delete"}} {
			if strings.EqualFold(name, verb) {
				ev.Activity, ev.ActivityName = as.id, as.name
			}
		}
	}
	if ev.ActivityName == "" {
		ev.ActivityName = "Refuse"
	}
}

// require fills in what the schema requires of the class.
func require(ev *event, m *mapping, e *store.Entry) {
	switch m.class {
	case classAPI:
		ev.API = &api{Operation: string(e.Type), Service: named{"countersign"}}
		if e.Request != "" {
			ev.API.Request = &uid{e.Request}
		}
		if ev.Source == nil {
			// The address of the caller is not on record; by whom it came is.
			ev.Source = &endpoint{Service: e.Writer}
		}
	case classHTTP:
		// One of both endpoints is due, and the request or its response.
		ev.Destination = &endpoint{Service: e.Resource}
		if ev.Source == nil {
			ev.Source = &endpoint{Service: e.Writer}
		}
	case classDatastore:
		ev.Database = &database{Name: e.Resource, Type: 1}
		if ev.Source == nil {
			ev.Source = &endpoint{Service: e.Writer}
		}
	case classLogin:
		ev.User, ev.Service = ev.Actor.User, &named{"countersign"}
	case classAuthorize, classUserAccess:
		ev.User = &user{UID: e.Agent, Type: 4}
		if e.Action != "" {
			ev.Privileges = []string{e.Action}
		}
	case classAccount:
		ev.User = &user{UID: e.Agent, Type: 4}
		if e.Person != nil {
			ev.User = &user{UID: *e.Person, Type: 1}
		}
	case classEntity:
		if ev.Entity == nil || ev.Entity.UID == "" {
			ev.Entity = &entity{UID: e.ID}
		}
		ev.Entity.Type = m.entity
	case classDetection:
		ev.Alert = true
		ev.Finding = &finding{UID: e.ID, Title: m.says, Created: e.Time.UnixMilli()}
		if e.Action != "" {
			ev.Finding.Types = []string{e.Action}
		}
		if e.Cause != nil {
			ev.Finding.Title = *e.Cause
		}
		if d, err := store.DetailsAs[store.AlertDetails](e); err == nil && d.Alert != "" {
			if title := alerts[d.Alert]; title != "" {
				ev.Finding.Title = title
			}
			ev.Finding.Types, ev.Finding.Says = append([]string{d.Alert}, ev.Finding.Types...), d.What
		}
	}
}

// alerts are the titles of findings.
var alerts = map[string]string{
	store.AlertMint:    "A token was made by the broker's Vault login without an intent on record",
	store.AlertUse:     "A credential was used, and it is not known which",
	store.AlertLateUse: "A credential was used after its end",
	store.AlertRevoke:  "Credentials under a freeze could not be revoked yet",
}

// matches reports whether t is one of types: exact, or "credential.*"; none
// names every type.
func matches(types []string, t store.Type) bool {
	return len(types) == 0 || slices.ContainsFunc(types, func(p string) bool {
		if n := len(p) - 1; n > 0 && p[n] == '*' {
			return len(t) >= n && string(t[:n]) == p[:n]
		}
		return p == string(t)
	})
}
