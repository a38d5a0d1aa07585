package main

import (
	"bytes"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

func TestWhatATargetSaysTooMuchIsNotLogged(t *testing.T) {
	var logged bytes.Buffer
	args, to := os.Args, log.Writer()
	t.Cleanup(func() { os.Args = args; log.SetOutput(to) })
	log.SetOutput(&logged)
	os.Args = []string{"countersign", "version"}
	if code := run(); code != 0 {
		t.Fatalf("exit %d", code)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = c.Read(make([]byte, 4<<10))
		_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokada@example.com"))
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, _ = c.Read(make([]byte, 1)) // until the client has seen it
	}()
	client := &http.Client{Transport: &http.Transport{}}
	res, err := client.Get("http://" + l.Addr().String())
	must(t, err)
	_, err = io.Copy(io.Discard, res.Body)
	must(t, err)
	must(t, res.Body.Close())
	<-closed
	if strings.Contains(logged.String(), "ada") {
		t.Errorf("the log says %s", &logged)
	}
}
