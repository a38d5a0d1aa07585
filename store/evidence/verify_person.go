package evidence

import (
	"strings"

	"github.com/countersign-dev/countersign/store"
)

// named is the name under which a pseudonym was first seen.
type named struct {
	name  string
	index int64
}

// person judges whose name stands beside the pseudonym of an entry. People sign
// by pseudonym, and it is by name that a reader knows them: a name that changes
// would put one person's decision in another's mouth. The pseudonym itself is
// keyed (store.PrivacyKey), so that no verifier can work it out; but one pseudonym
// is of one name, for good.
func (j *judge) person(index int64, e *store.Entry, opened map[string]string) {
	name := opened[store.SealedPerson]
	if e.Person == nil || name == "" {
		return // erased, or nobody's
	}
	first, ok := j.people[*e.Person]
	switch {
	case !ok:
		j.people[strings.Clone(*e.Person)] = named{name, index}
	case first.name != name:
		j.r.add(index, KindPerson, "%q stands beside the pseudonym %.100q, which entry %d says is %q", name, *e.Person, first.index, first.name)
	}
}

// voted judges an approval beside those that its request has: nobody fills two
// seats by having two pseudonyms. A pseudonym changes with the privacy key, and
// no request waits that long.
func (j *judge) voted(index int64, e *store.Entry) {
	q := j.state.Request(e.Request)
	if q == nil || q.Pending == nil || e.Person == nil {
		return
	}
	own, ok := j.people[*e.Person]
	for _, v := range q.Pending.Votes {
		if other, known := j.people[v.Person]; ok && known && v.Person != *e.Person && other.name == own.name {
			j.r.add(index, KindPerson, "%q has decided already, in entry %d, under another pseudonym", own.name, v.Index)
			return
		}
	}
}
