package record

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestAWriterWhoSendsTooMuchAtOnceWaitsAndNobodyElseDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(nil, nil)
		defer s.Drain()
		var held []func()
		for _, size := range []int64{-1, MaxBody, MaxBody + 1, -1, MaxBody, MaxBody, MaxBody, MaxBody} {
			free, err := s.admit(t.Context(), "broker-1", size)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, free)
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.admit(short, "broker-1", 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("one byte more: %v", err)
		}
		if free, err := s.admit(t.Context(), "broker-2", MaxBody); err != nil {
			t.Fatal(err)
		} else {
			free()
		}
		got := make(chan error, 1)
		go func() {
			free, err := s.admit(t.Context(), "broker-1", MaxBody)
			if err == nil {
				free()
			}
			got <- err
		}()
		synctest.Wait()
		select {
		case <-got:
			t.Fatal("it did not wait")
		default:
		}
		held[3]()
		if err := <-got; err != nil {
			t.Fatal(err)
		}
	})
}
