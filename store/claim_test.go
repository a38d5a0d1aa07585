package store

import (
	"fmt"
	"strings"
	"testing"
)

// seen are entries of a step about one target, written short: "gateway" and
// "direct" are requests with their credential, "use", "ask" (introspection) and
// "audit" uses, "ok" and "42501" and the like outcomes, "refused", and claims as
// they are claimed. "other:" before any of these puts it at another target.
func seen(t *testing.T, words string) (list []*Entry) {
	t.Helper()
	add := func(typ Type, target string, details any) {
		e := &Entry{V: 1, ID: NewID(), Type: typ, Run: "r", Step: "s", Request: "req_" + target, Resource: target}
		e.SetDetails(details)
		list = append(list, e)
	}
	for word := range strings.FieldsSeq(words) {
		target := "postgres://orders"
		if rest, ok := strings.CutPrefix(word, "other:"); ok {
			target, word = "https://other", rest
		}
		switch word {
		case "gateway":
			add(StepRequested, target, RequestedDetails{Grant: Grant{Delivery: "gateway", Access: &Access{Protocol: ProtocolPostgres}}})
			add(CredentialIssued, target, IssuedDetails{})
		case "direct":
			add(StepRequested, target, RequestedDetails{Grant: Grant{Delivery: "direct", Params: map[string]string{"x": `"delivery":"gateway"`}}})
			add(CredentialIssued, target, IssuedDetails{})
		case "use":
			add(CredentialUsed, target, UsedDetails{Via: ViaGateway})
		case "ask":
			add(CredentialUsed, target, UsedDetails{Via: ViaIntrospection})
		case "audit":
			add(CredentialUsed, target, UsedDetails{Via: ViaVaultAudit})
		case "audit!": // which failed
			add(CredentialUsed, target, UsedDetails{Via: ViaVaultAudit})
			add(UseFinished, target, UseFinishedDetails{Outcomes: []UseOutcome{{Use: list[len(list)-1].ID, Error: "permission denied"}}})
		case "ok":
			add(UseFinished, target, UseFinishedDetails{Outcomes: []UseOutcome{{}}})
		case "refused":
			add(AccessRefused, target, RefusedDetails{Intent: "i"})
		case "call": // an API call that was refused: it says nothing of the target
			add(AccessRefused, target, RefusedDetails{Problem: "role-forbidden"})
		case "succeeded", "failed", "skipped", "done":
			add(StepFinished, "", FinishedDetails{Outcome: word})
		case "succeeded@", "failed@":
			add(StepFinished, "", FinishedDetails{Outcome: strings.TrimSuffix(word, "@"), Target: target})
		default:
			add(UseFinished, target, UseFinishedDetails{Outcomes: []UseOutcome{{Error: word}}})
		}
	}
	return list
}

func TestAClaimIsComparedWithWhatWasObserved(t *testing.T) {
	for _, x := range []struct {
		entries string
		verdict Verdict
		why     string
	}{
		{"gateway use ok", "", ""},
		{"gateway use ok succeeded", Agree, "Claimed succeeded, and 1 use was seen, and all that ended succeeded."},
		{"gateway use use ok 42P01 succeeded", Differ, "Claimed succeeded, and the last use failed (42P01), 1 of 2."},
		{"gateway use 42P01 use ok succeeded", Agree, "Claimed succeeded, and 2 uses were seen, the last of which succeeded; 1 failed before."},
		{"gateway succeeded use 42P01", Differ, "Claimed succeeded, and the last use failed (42P01), 1 of 1."},
		{"gateway use ok refused succeeded", Agree, "Claimed succeeded, and 1 use was seen, and all that ended succeeded; 1 attempt was refused."},
		{"gateway refused refused succeeded", Differ, "Claimed succeeded, and 2 attempts were refused, none let through."},
		{"gateway succeeded", Differ, "Claimed succeeded, and no use was seen, though the credential works on the access path alone."},
		{"direct succeeded", NotObserved, "Claimed succeeded, and no use could be observed, since the secret was handed out directly."},
		{"direct call succeeded", NotObserved, "Claimed succeeded, and no use could be observed, since the secret was handed out directly."},
		{"direct ask succeeded", Agree, "Claimed succeeded, and 1 use was seen."},
		{"direct audit succeeded", Agree, "Claimed succeeded, and 1 use was seen, and all that ended succeeded."},
		{"direct audit! audit succeeded", Agree, "Claimed succeeded, and 2 uses were seen, the last of which succeeded; 1 failed before."},
		{"direct audit audit! succeeded", Differ, "Claimed succeeded, and the last use failed (permission denied), 1 of 2."},
		{"gateway audit succeeded", Differ, "Claimed succeeded, and no use was seen, though the credential works on the access path alone."},
		{"direct ask failed", NotObserved, "Claimed failed, and 1 use was seen, and not with what result."},
		{"gateway use use succeeded", NotObserved, "Claimed succeeded, and 2 uses were seen, and what came of them is not on record."},
		{"gateway use use ok succeeded", Agree, "Claimed succeeded, and 2 uses were seen, and all that ended succeeded; what came of 1 use is not on record."},
		{"succeeded", NotObserved, "Claimed succeeded, and no credential was issued to the step."},
		{"failed", Agree, "Claimed failed, and no credential was issued to the step."},
		{"skipped", Agree, "Claimed skipped, and no credential was issued to the step."},
		{"gateway use ok use ok use ok skipped", Differ, "Claimed skipped, and 3 uses were seen."},
		{"gateway refused skipped", Differ, "Claimed skipped, and 1 attempt was refused."},
		{"gateway skipped", Agree, "Claimed skipped, and nothing was reached."},
		{"direct skipped", NotObserved, "Claimed skipped, and no use could be observed, since the secret was handed out directly."},
		{"gateway use 57014 failed", Agree, "Claimed failed, and the last use failed (57014), 1 of 1."},
		{"gateway refused failed", Agree, "Claimed failed, and 1 attempt was refused, none let through."},
		{"gateway failed", Agree, "Claimed failed, and nothing was reached."},
		{"gateway use ok failed", Differ, "Claimed failed, and 1 use was seen, the last of which succeeded."},
		{"gateway use ok refused failed", Agree, "Claimed failed, and 1 use was seen; 1 attempt was refused."},
		{"gateway use ok other:succeeded@", Differ, "Claimed succeeded at https://other, and no credential of the step reaches that target."},
		{"gateway use ok other:failed@", Agree, "Claimed failed at https://other, and no credential of the step reaches that target."},
		{"gateway use ok succeeded@ other:gateway other:use other:502", Agree, "Claimed succeeded at postgres://orders, and 1 use was seen, and all that ended succeeded."},
		{"gateway use ok other:gateway other:use other:502 succeeded", Differ, "Claimed succeeded, and the last use failed (502), 1 of 2."},
		{"gateway other:gateway other:use other:ok succeeded@", Differ, "Claimed succeeded at postgres://orders, and no use was seen, though the credential works on the access path alone."},
		{"gateway use ok failed succeeded", Agree, "Claimed succeeded, and 1 use was seen, and all that ended succeeded."},
		{"gateway use ok done", NotObserved, "Claimed done, and that is no outcome which could be compared."},
	} {
		v, why, err := JudgeClaim(seen(t, x.entries))
		if err != nil || v != x.verdict || why != x.why {
			t.Errorf("%s: %q, %q, %v\nwant %q, %q", x.entries, v, why, err, x.verdict, x.why)
		}
	}
}

func TestAnAccountStaysSmallHoweverManyTargetsAStepReaches(t *testing.T) {
	var a Account
	for i := range 10 * maxPlaces {
		a.Issued(&Entry{Type: CredentialIssued, Resource: fmt.Sprint("t", i), Request: "r"})
	}
	if len(a.places) != maxPlaces {
		t.Errorf("%d places, want %d", len(a.places), maxPlaces)
	}
	a.Claimed(FinishedDetails{Outcome: "succeeded", Target: "t600"})
	if v, why := a.Verdict(); v != NotObserved || !strings.Contains(why, "more targets") {
		t.Errorf("%s: %s", v, why)
	}
}

func TestAGrantForTheAccessPathIsReadOnlyWhereItIsOne(t *testing.T) {
	list := seen(t, "gateway direct")
	if a, err := GrantedAccess(list[0]); err != nil || a == nil || a.Protocol != ProtocolPostgres {
		t.Errorf("%v, %v", a, err)
	}
	if a, err := GrantedAccess(list[2]); err != nil || a != nil {
		t.Errorf("a direct grant: %v, %v", a, err)
	}
	bad := &Entry{Type: StepRequested, Details: []byte(`{"grant":{"delivery":"gateway"}}`)}
	if _, err := GrantedAccess(bad); err == nil {
		t.Error("a grant without access passes")
	}
}
