package main

import (
	"bytes"
	"encoding/json"
	"strings"
)

// The shapes below are those that Ollama's chat API reads; keys it does not know are dropped, as it drops them.

type message struct {
	Role       string     `json:"role"`
	Content    string     `json:"content"`
	Thinking   string     `json:"thinking"`
	ToolCalls  []toolCall `json:"tool_calls"`
	ToolName   string     `json:"tool_name"`
	ToolCallID string     `json:"tool_call_id"`
}

type toolCall struct {
	ID       string `json:"id"`
	Function struct {
		Index     int       `json:"index"`
		Name      string    `json:"name"`
		Arguments arguments `json:"arguments"`
	} `json:"function"`
}

type arguments map[string]any

type toolList []tool

type tool struct {
	Type     string `json:"type"`
	Items    any    `json:"items,omitempty"`
	Function struct {
		Name        string `json:"name"`
		Description string `json:"description"`
		Parameters  struct {
			Type       string     `json:"type"`
			Defs       any        `json:"$defs,omitempty"`
			Items      any        `json:"items,omitempty"`
			Required   []string   `json:"required,omitempty"`
			Properties properties `json:"properties"`
		} `json:"parameters"`
	} `json:"function"`
}

type properties map[string]property

type property struct {
	AnyOf       []property  `json:"anyOf,omitempty"`
	Type        typeNames   `json:"type,omitempty"`
	Items       any         `json:"items,omitempty"`
	Description string      `json:"description,omitempty"`
	Enum        []any       `json:"enum,omitempty"`
	Properties  *nestedKeys `json:"properties,omitempty"`
	Required    []string    `json:"required,omitempty"`
}

// typeNames is one JSON schema type or a list of them.
type typeNames []string

func (t *typeNames) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*t = typeNames{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(t))
}

func (t typeNames) MarshalJSON() ([]byte, error) {
	if len(t) == 1 {
		return json.Marshal(t[0])
	}
	return json.Marshal([]string(t))
}

// nestedKeys keeps the written order of the properties of an object below the first level.
type nestedKeys struct {
	names  []string
	values map[string]property
}

func (n *nestedKeys) UnmarshalJSON(data []byte) error {
	if err := json.Unmarshal(data, &n.values); err != nil {
		return err
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	if _, err := decoder.Token(); err != nil {
		return err
	}
	for decoder.More() {
		name, err := decoder.Token()
		if err != nil {
			return err
		}
		n.names = append(n.names, name.(string))
		var skipped json.RawMessage
		if err := decoder.Decode(&skipped); err != nil {
			return err
		}
	}
	return nil
}

func (n nestedKeys) MarshalJSON() ([]byte, error) {
	var b strings.Builder
	for i, name := range n.names {
		if i > 0 {
			b.WriteString(",")
		}
		b.WriteString(marshal(name) + ":" + marshal(n.values[name]))
	}
	return []byte("{" + b.String() + "}"), nil
}

func (a arguments) String() string  { return object(a == nil, a) }
func (p properties) String() string { return object(p == nil, p) }
func (t toolList) String() string   { return marshal(t) }
func (t tool) String() string       { return marshal(t) }

func object(empty bool, v any) string {
	if empty {
		return "{}"
	}
	return marshal(v)
}

func marshal(v any) string {
	data, _ := json.Marshal(v)
	return string(data)
}

func typeScript(v any) string {
	p, ok := v.(property)
	if !ok {
		if pointer, isPointer := v.(*property); isPointer && pointer != nil {
			p = *pointer
		} else {
			return "any"
		}
	}
	names := make([]string, 0, len(p.AnyOf)+len(p.Type))
	for _, option := range p.AnyOf {
		names = append(names, typeScript(option))
	}
	if len(p.AnyOf) == 0 {
		known := map[string]string{
			"string": "string", "number": "number", "integer": "number", "boolean": "boolean",
			"array": "any[]", "object": "Record<string, any>", "null": "null",
		}
		for _, name := range p.Type {
			if script, found := known[name]; found {
				names = append(names, script)
			} else {
				names = append(names, "any")
			}
		}
	}
	if len(names) == 0 {
		return "any"
	}
	return strings.Join(names, " | ")
}
