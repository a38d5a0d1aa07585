package approve

import "testing"

func TestOnePersonDoesNotTakeAllStreams(t *testing.T) {
	s := New(Config{})
	var last func()
	for range maxStreamsEach {
		leave, ok := s.enter("user:ann")
		if !ok {
			t.Fatal("refused too early")
		}
		last = leave
	}
	if _, ok := s.enter("user:ann"); ok {
		t.Error("one person has more streams than they may")
	}
	if _, ok := s.enter("user:ben"); !ok {
		t.Error("another person gets none")
	}
	last()
	if _, ok := s.enter("user:ann"); !ok {
		t.Error("a stream that ended is still counted")
	}
}
